"""The models that the paper compares, each named by the methods that it switches on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vr_jax.model.config import ImageConfig, VlmConfig, anyres4, anyres9
from vr_jax.model.decoders.transformer import TransformerConfig

# The decoders of the paper by size, as published.
DECODERS: dict[str, TransformerConfig] = {
    "0.5b": TransformerConfig(hidden_size=896, intermediate_size=4864, num_layers=24, num_heads=14, num_kv_heads=2),
    "1.5b": TransformerConfig(hidden_size=1536, intermediate_size=8960, num_layers=28, num_heads=12, num_kv_heads=2),
    "7b": TransformerConfig(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        tie_word_embeddings=False,
    ),
}
# The image layouts of the paper's experiments by name.
IMAGES: dict[str, Callable[..., ImageConfig]] = {"anyres4": anyres4, "anyres9": anyres9}

Fields = Mapping[str, Any]  # the fields of a method's config; `name` says which method


@dataclass(frozen=True, kw_only=True)
class System:
    """One model of a table.

    Attributes:
        title: What the paper's table calls it.
        projector: Name and fields of the projector.
        refusion: Name and fields of the re-fusion block, or None.
        insert_every: When set, the re-fusion block acts after the first and then after every n-th decoder layer,
            instead of after fixed layers.
        pruning: Name and fields of a pruner, or None. Pruners need no training: the trained model is the same without.
        extra: Whether the paper does not have this system.
    """

    title: str
    projector: Fields
    refusion: Fields | None = None
    insert_every: int | None = None
    pruning: Fields | None = None
    extra: bool = False

    def config(self, decoder: TransformerConfig, image: str) -> VlmConfig:
        """Returns the model at the paper's sizes.

        Args:
            decoder: The decoder, one of `DECODERS`.
            image: The image layout, a key of `IMAGES`.
        """
        return self.at(VlmConfig(decoder=decoder, image=IMAGES[image]()))

    def at(
        self,
        size: VlmConfig,
        levels: Mapping[int, int] | None = None,
        changes: Mapping[str, Fields] | None = None,
    ) -> VlmConfig:
        """Returns the model with the sizes of another one.

        Args:
            size: A config with the encoder, the decoder and the images that the model gets.
            levels: The hidden states of a shallower encoder that take the place of the paper's.
            changes: Further fields of methods, by the method's name, such as widths and heads.

        Raises:
            ConfigError: The methods do not fit these sizes.
        """
        refusion = self.refusion
        if refusion is not None and self.insert_every is not None:
            refusion = {**refusion, "insert_after": tuple(range(1, size.decoder.num_layers, self.insert_every))}
        methods: dict[str, Any] = {}
        for kind, fields in {"projector": self.projector, "refusion": refusion, "pruning": self.pruning}.items():
            if fields is None:
                continue
            method = VlmConfig.parse_field(kind, {**fields, **(changes or {}).get(fields["name"], {})}, kind)
            if levels is not None and hasattr(method, "levels"):
                method = dataclasses.replace(method, levels=tuple(levels[level] for level in method.levels))
            methods[kind] = method
        if "pruning" in methods:
            methods["image"] = methods["pruning"].adapt_image(size.image)
        return dataclasses.replace(size, **methods)


def pool(stride: int = 3) -> Fields:
    """Returns average pooling of windows of stride x stride patches."""
    return {"name": "pool", "stride": stride}


def remember(**changes: Any) -> Fields:
    """Returns Vision Remember in the paper's main setting, or with changed fields."""
    return {"name": "vision_remember", "insert_after": (1, 4), "levels": (7, 15, 23), **changes}


UNCOMPRESSED: Fields = {"name": "mlp", "stride": 1}
BASELINE = System(title="Baseline (pooling)", projector=pool())
VISION_REMEMBER = System(title="Vision Remember", projector=pool(), refusion=remember())
