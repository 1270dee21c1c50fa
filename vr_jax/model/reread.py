"""The attention weights of the local cross-attention of Vision Remember, at every insertion."""

from __future__ import annotations

from typing import Any

import jax

from vr_jax.errors import ConfigError
from vr_jax.model.batch import Batch
from vr_jax.model.config import VlmConfig
from vr_jax.model.decoders.stages import DecoderInputs, StageHook
from vr_jax.model.refusion.vision_remember import Reread, VisionRememberConfig
from vr_jax.model.vlm import VisionLanguageModel
from vr_jax.sharding import constrain

# The state of the model's own stage hook, and the results so far.
State = tuple[Any, tuple[Reread, ...]]


def reread_refusal(config: VlmConfig) -> str | None:
    """The reason why `reread` does not work with a model, or None where it works."""
    refusion = config.refusion
    if not isinstance(refusion, VisionRememberConfig):
        found = "no re-fusion block" if refusion is None else f"the re-fusion block {refusion.name!r}"
        return f"only Vision Remember re-reads windows; this model has {found}"
    if refusion.interaction != "local":
        return (
            f"refusion.interaction {refusion.interaction!r} has no weights over the patches of a token's own window; "
            "only 'local' does"
        )
    return None


def reread(model: VisionLanguageModel, batch: Batch) -> tuple[Reread, ...]:
    """The weights and updates of every insertion, from a prefill that ends at the last of them.

    The function is for jax.jit. Rows may be packed and may be sharded; the result is whole on every device.

    Args:
        model: A model for which `reread_refusal` gives no reason.
        batch: The batch.

    Returns:
        One `Reread` for each of `config.refusion.insert_after`.

    Raises:
        ConfigError: The model has no local cross-attention.
    """
    if refusal := reread_refusal(model.config):
        raise ConfigError(f"reread: {refusal}")
    refusion = model.refusion
    assert refusion is not None
    assert model.config.refusion is not None
    levels = model.encode_images(batch)
    context, hook = model.vision_context(levels, batch), model.stage_hook(levels, batch)
    assert hook is not None

    insertions = model.config.refusion.insert_after

    def apply(k: int, inputs: DecoderInputs, state: State) -> tuple[DecoderInputs, State]:
        inner, found = state
        if k:
            found = (*found, refusion.block(len(found)).reread(inputs, context))
        inputs, inner = hook.apply(k, inputs, inner)
        return inputs, (inner, found)

    inputs = model.inputs(levels, batch)
    states = model.decoder.hidden_states(inputs, insertions[-1:], StageHook(apply, (hook.state, ())))
    _, found = states.hook_state
    last = refusion.block(len(insertions) - 1)
    found = (*found, last.reread(inputs.replace(hidden=states.after[insertions[-1]]), context))
    whole: tuple[Reread, ...] = jax.tree.map(lambda x: constrain(x, *[None] * x.ndim), found)
    return whole
