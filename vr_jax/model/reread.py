"""What the vision tokens of LLaVA-VR re-read: the weights of the local cross-attention at every insertion."""

from __future__ import annotations

import jax

from vr_jax.model.batch import Batch
from vr_jax.model.config import ConfigError, VisionRememberConfig, VlmConfig
from vr_jax.model.decoders.qwen2 import DecoderInputs
from vr_jax.model.refusion.vision_remember import Reread
from vr_jax.model.vlm import VisionLanguageModel
from vr_jax.sharding import constrain


def reread_refusal(config: VlmConfig) -> str | None:
    """Why `reread` has nothing to say about a model; None where it has."""
    refusion = config.refusion
    if not isinstance(refusion, VisionRememberConfig):
        found = "no refusion" if refusion is None else f"re-fusion block {refusion.name!r}"
        return f"only Vision Remember re-reads windows; this model has {found}"
    if refusion.interaction != "local":
        return (
            f"refusion.interaction {refusion.interaction!r} has no weights over the patches of a token's own window; "
            "only 'local' does"
        )
    return None


def reread(model: VisionLanguageModel, batch: Batch) -> tuple[Reread, ...]:
    """One Reread for each of `config.refusion.insert_after`, from a prefill that ends at the last of them.

    For jax.jit; rows may be packed, and may be sharded: the result is whole on every device. Raises ConfigError with
    `reread_refusal`."""
    if refusal := reread_refusal(model.config):
        raise ConfigError(f"reread: {refusal}")
    assert model.config.refusion is not None
    levels = model.encode_images(batch.tile_pixels)
    context, stage_hook = model.vision_context(levels, batch), model.stage_hook(levels, batch)
    assert stage_hook is not None
    found: list[Reread] = []

    def watched(k: int, inputs: DecoderInputs) -> DecoderInputs:
        if k:
            found.append(model.refusion(k).reread(inputs, context))
        return stage_hook(k, inputs)

    last = model.config.refusion.insert_after[-1]
    inputs = model.inputs(levels, batch)
    before_last = model.decoder.hidden_states(inputs, [last], watched).after[last]
    found.append(model.refusion(len(found) + 1).reread(inputs.replace(hidden=before_last), context))
    return jax.tree.map(lambda x: constrain(x, *[None] * x.ndim), tuple(found))
