"""What the vision tokens of LLaVA-VR re-read: the weights of the local cross-attention at every insertion."""

from __future__ import annotations

import jax

from vr_jax.model.batch import Batch
from vr_jax.model.config import ConfigError, LlavaConfig, VisionRememberConfig
from vr_jax.model.interludes.vision_remember import Reread
from vr_jax.model.llava import Llava
from vr_jax.model.qwen2 import Stream
from vr_jax.sharding import constrain


def reread_refusal(config: LlavaConfig) -> str | None:
    """Why `reread` has nothing to say about a model; None where it has."""
    interlude = config.interlude
    if not isinstance(interlude, VisionRememberConfig):
        found = "no interlude" if interlude is None else f"interlude {interlude.name!r}"
        return f"only Vision Remember re-reads windows; this model has {found}"
    if interlude.interaction != "local":
        return (
            f"interlude.interaction {interlude.interaction!r} has no weights over the patches of a token's own window; "
            "only 'local' does"
        )
    return None


def reread(model: Llava, batch: Batch) -> tuple[Reread, ...]:
    """One Reread for each of `config.interlude.insert_after`, from a prefill that ends at the last of them.

    For jax.jit; rows may be packed, and may be sharded: the result is whole on every device. Raises ConfigError with
    `reread_refusal`."""
    if refusal := reread_refusal(model.config):
        raise ConfigError(f"reread: {refusal}")
    assert model.config.interlude is not None
    levels = model.encode_images(batch.tile_pixels)
    context, between = model.vision_context(levels, batch), model.between(levels, batch)
    assert between is not None
    found: list[Reread] = []

    def watched(k: int, stream: Stream) -> Stream:
        if k:
            found.append(model.interlude(k).reread(stream, context))
        return between(k, stream)

    last = model.config.interlude.insert_after[-1]
    stream = model.stream(levels, batch)
    before_last = model.decoder.hidden_states(stream, [last], watched).after[last]
    found.append(model.interlude(len(found) + 1).reread(stream.replace(hidden=before_last), context))
    return jax.tree.map(lambda x: constrain(x, *[None] * x.ndim), tuple(found))
