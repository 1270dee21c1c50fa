"""Frozen, validated descriptions of every part of the model. A checkpoint holds `VlmConfig.to_dict()`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from vr_jax.model.config_vision_remember import VisionRememberConfig
from vr_jax.model.registry import (
    Config,
    ConfigError,
    ProjectorConfig,
    PrunerConfig,
    RefusionConfig,
    check,
    check_choice,
)

__all__ = [
    "ConfigError",
    "ImageConfig",
    "ProjectorConfig",
    "PrunerConfig",
    "Qwen2Config",
    "RefusionConfig",
    "SiglipConfig",
    "VisionRememberConfig",
    "VlmConfig",
    "anyres4",
    "anyres9",
    "anyres9_all36",
    "single_tile",
]


@dataclass(frozen=True, kw_only=True)
class SiglipConfig(Config):
    """SigLIP vision tower; defaults are `google/siglip-large-patch16-384`."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_layers: int = 24
    num_heads: int = 16
    image_size: int = 384  # pixels
    patch_size: int = 16  # pixels
    layer_norm_eps: float = 1e-6

    def __post_init__(self):
        check(
            self.hidden_size % self.num_heads == 0,
            f"SiglipConfig.hidden_size = {self.hidden_size} is not divisible by num_heads = {self.num_heads}",
        )

    @property
    def grid(self) -> int:
        """Patches per side; a remainder of pixels is dropped at the right and bottom (so400m/14-384: 27)."""
        return self.image_size // self.patch_size


@dataclass(frozen=True, kw_only=True)
class Qwen2Config(Config):
    """Qwen2 decoder; defaults are `Qwen/Qwen2-0.5B-Instruct`."""

    vocab_size: int = 151936
    hidden_size: int = 896
    intermediate_size: int = 4864
    num_layers: int = 24
    num_heads: int = 14
    num_kv_heads: int = 2
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02  # of random weights; narrow models trained from scratch want about width ** -0.5

    def __post_init__(self):
        check(
            self.hidden_size % self.num_heads == 0,
            f"Qwen2Config.hidden_size = {self.hidden_size} is not divisible by num_heads = {self.num_heads}",
        )
        check(
            self.num_heads % self.num_kv_heads == 0,
            f"Qwen2Config.num_heads = {self.num_heads} is not a multiple of num_kv_heads = {self.num_kv_heads}",
        )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True, kw_only=True)
class ImageConfig(Config):
    """How an image becomes tiles and vision tokens (methods.md 1.2, 1.3)."""

    tile_size: int = 384  # pixels; must equal the encoder's image_size
    # square: squash to one tile; pad: pad to a square, one tile; anyres: base tile plus the best grid;
    # anyres_max: the same, and grids above max_tiles are shrunk bilinearly after the projector (OneVision).
    aspect_ratio: Literal["square", "pad", "anyres", "anyres_max"] = "anyres_max"
    grids: tuple[tuple[int, int], ...] = ()  # allowed (columns, rows), in LLaVA's order
    max_tiles: int = 9  # N of anyres_max_N
    unpad: bool = True  # drop padding rows/columns, end each row with the newline vector ("spatial_unpad")
    unpad_rounding: Literal["truncate", "round7"] = "truncate"  # round7: transformers' variant

    def __post_init__(self):
        check_choice("ImageConfig", "aspect_ratio", self.aspect_ratio, ("square", "pad", "anyres", "anyres_max"))
        check_choice("ImageConfig", "unpad_rounding", self.unpad_rounding, ("truncate", "round7"))
        check(
            bool(self.grids) or not self.is_anyres,
            f"ImageConfig.grids is empty: aspect_ratio {self.aspect_ratio!r} needs at least one (columns, rows)",
        )

    @property
    def is_anyres(self) -> bool:
        return self.aspect_ratio in ("anyres", "anyres_max")

    @property
    def max_tiles_per_image(self) -> int:
        """Tiles of the largest grid plus the base tile."""
        return 1 + max(w * h for w, h in self.grids) if self.is_anyres else 1

    @property
    def may_interpolate(self) -> bool:
        """Whether a grid exists whose packed map is shrunk bilinearly (then tokens leave the cell grid).

        OneVision shrinks when sqrt(h * w / (max_tiles * u^2)) > 1.1, h * w being the unpadded map."""
        if self.aspect_ratio != "anyres_max":
            return False
        return any(math.sqrt(w * h / self.max_tiles) > 1.1 for w, h in self.grids)


def single_tile(tile_size: int = 384, *, aspect_ratio: str = "square", unpad: bool = False) -> ImageConfig:
    """One tile per image; the paper's phase 1 uses the squashed one without newline."""
    return ImageConfig(tile_size=tile_size, aspect_ratio=aspect_ratio, unpad=unpad)  # type: ignore[arg-type]


def anyres4(tile_size: int = 384) -> ImageConfig:
    """LLaVA-NeXT's five grids, at most four tiles and the base (the paper's ablations)."""
    grids = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
    return ImageConfig(tile_size=tile_size, aspect_ratio="anyres", grids=grids)


def anyres9(tile_size: int = 384) -> ImageConfig:
    """The paper's main setting: every grid of at most nine tiles; no bilinear branch (methods.md 1.3)."""
    grids = tuple((w, h) for w in range(1, 7) for h in range(1, 7) if w * h <= 9)
    return ImageConfig(tile_size=tile_size, aspect_ratio="anyres_max", grids=grids)


def anyres9_all36(tile_size: int = 384) -> ImageConfig:
    """OneVision's official 36 grids up to 6x6, with the bilinear branch."""
    grids = tuple((w, h) for w in range(1, 7) for h in range(1, 7))
    return ImageConfig(tile_size=tile_size, aspect_ratio="anyres_max", grids=grids)


@dataclass(frozen=True, kw_only=True)
class VlmConfig(Config):
    """A whole LVLM: encoder, projector, decoder, and at most one re-fusion block or pruner between decoder stages."""

    encoder: SiglipConfig = field(default_factory=SiglipConfig)
    decoder: Qwen2Config = field(default_factory=Qwen2Config)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    refusion: RefusionConfig | None = None
    pruning: PrunerConfig | None = None  # inference only
    image: ImageConfig = field(default_factory=anyres9)
    vision_feature_layer: int = 23  # hidden state that feeds the projector; 0 = patch embeddings
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations; norms, softmax and loss stay float32
    # Of encoder and decoder; auto: what suits the platform (kernels/attention/api.py).
    attention: Literal["auto", "xla", "blocked", "cudnn", "splash"] = "auto"
    remat: Literal["none", "full", "dots"] = "none"  # of the decoder's layers

    def __post_init__(self):
        for kind in _METHODS:
            method = getattr(self, kind)
            if method is not None:
                object.__setattr__(self, kind, _own_class(kind, method))
        check_choice("VlmConfig", "dtype", self.dtype, ("float32", "bfloat16"))
        check_choice("VlmConfig", "attention", self.attention, ("auto", "xla", "blocked", "cudnn", "splash"))
        check_choice("VlmConfig", "remat", self.remat, ("none", "full", "dots"))
        check(
            self.attention != "cudnn" or self.dtype == "bfloat16",
            f"VlmConfig.attention = 'cudnn' with dtype = {self.dtype!r}: cuDNN attends in 'bfloat16' only",
        )
        grid, stride = self.encoder.grid, self.projector.stride
        check(
            grid % stride == 0,
            f"projector.stride = {stride} does not divide the encoder's {grid} x {grid} patch grid; "
            f"divisors: {[s for s in range(1, grid + 1) if grid % s == 0]}",
        )
        check(
            self.image.tile_size == self.encoder.image_size,
            f"image.tile_size = {self.image.tile_size} differs from vision.image_size = {self.encoder.image_size}",
        )
        self._check_levels("vision_feature_layer", (self.vision_feature_layer,))
        self._check_levels("projector.levels", self.projector.feature_levels(self))
        self.projector.check_model(self)
        if self.refusion is not None:
            self._check_refusion(self.refusion)
        if self.pruning is not None:
            self._check_pruning(self.pruning)

    def _check_levels(self, name: str, levels: tuple[int, ...]) -> None:
        depth = self.encoder.num_layers
        for level in levels:
            check(0 <= level <= depth, f"{name}: hidden state {level} does not exist, the encoder has 0..{depth}")

    def _check_refusion(self, refusion: RefusionConfig) -> None:
        self._check_levels("refusion.levels", refusion.levels)
        outside = [i for i in refusion.insert_after if not 1 <= i < self.decoder.num_layers]
        check(
            not outside,
            f"refusion.insert_after = {refusion.insert_after}: {outside} outside the decoder; "
            f"expected values in 1..{self.decoder.num_layers - 1}",
        )
        check(
            not self.image.may_interpolate,
            f"re-fusion block {refusion.name!r} needs one feature window per vision token, but the image grids "
            "reach the bilinear branch of anyres_max; use grids of at most max_tiles tiles (preset anyres9)",
        )
        windows = self.encoder.grid // self.projector.stride
        check(
            self.cells_per_side == windows,
            f"re-fusion block {refusion.name!r} needs one feature window per vision token: projector "
            f"{self.projector.name!r} makes {self.cells_per_side} x {self.cells_per_side} tokens, stride "
            f"{self.projector.stride} makes {windows} x {windows} windows; set a stride that gives as many",
        )
        refusion.check_model(self)

    def _check_pruning(self, pruning: PrunerConfig) -> None:
        check(
            self.refusion is None,
            f"pruning {pruning.name!r} with re-fusion block {self.refusion and self.refusion.name!r}: pruners drop the "
            "tokens that re-fusion blocks re-read; use one of them",
        )
        check(
            not self.image.may_interpolate,
            f"pruning {pruning.name!r}: the image grids reach the bilinear branch of anyres_max, whose tokens are no "
            "cells; use grids of at most max_tiles tiles (preset anyres9)",
        )
        pruning.check_model(self)
        depth = self.decoder.num_layers
        outside = [i for i in pruning.cuts(self) if not 0 <= i < depth]
        check(not outside, f"pruning {pruning.name!r}: layers {outside} outside the decoder; expected 0..{depth - 1}")
        self._check_levels("pruning", pruning.feature_levels(self))

    @classmethod
    def parse_field(cls, name: str, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if name in _METHODS:
            return _method_class(name, value.get("name")).from_dict(value)
        nested: dict[str, type[Config]] = {"encoder": SiglipConfig, "decoder": Qwen2Config, "image": ImageConfig}
        return nested[name].from_dict(value) if name in nested else value

    @property
    def cells_per_side(self) -> int:
        """n: vision tokens per side of one tile."""
        return self.projector.cells_per_side(self.encoder.grid)

    @property
    def cells_per_tile(self) -> int:
        return self.cells_per_side**2

    @property
    def feature_levels(self) -> tuple[int, ...]:
        """Encoder hidden states the model reads, shallow to deep."""
        refusion = self.refusion.levels if self.refusion else ()
        pruning = self.pruning.feature_levels(self) if self.pruning else ()
        return tuple(sorted({*refusion, *pruning, *self.projector.feature_levels(self), self.vision_feature_layer}))

    @property
    def decoder_bounds(self) -> tuple[int, ...]:
        """Stage k of the decoder holds layers bounds[k] .. bounds[k + 1] - 1."""
        cuts = self.refusion.insert_after if self.refusion else ()
        cuts += self.pruning.cuts(self) if self.pruning else ()
        return tuple(sorted({0, *cuts, self.decoder.num_layers}))

    @property
    def encoder_bounds(self) -> tuple[int, ...]:
        """Stage k of the encoder holds blocks bounds[k] .. bounds[k + 1] - 1; cut after every level that is read."""
        return tuple(sorted({0, *self.feature_levels, self.encoder.num_layers}))

    @property
    def text_pool(self) -> str:
        """Which text the text-guided token may pool; the data pipeline turns it into `text_token_mask`."""
        return self.refusion.pooled_text if self.refusion else "none"


_METHODS = ("projector", "refusion", "pruning")


def _method_class(kind: str, name: Any) -> type[ProjectorConfig | RefusionConfig | PrunerConfig]:
    """The config class of a method. Raises ConfigError for an unknown name, listing the known ones."""
    # Imported late, because the methods' modules import this one.
    from vr_jax.model.projectors import PROJECTORS
    from vr_jax.model.pruning import PRUNERS
    from vr_jax.model.refusion import REFUSION

    registries: dict[str, Mapping[str, Any]] = {
        "projector": PROJECTORS,
        "refusion": REFUSION,
        "pruning": PRUNERS,
    }
    known = registries[kind]
    check(name in known, f"{kind}.name = {name!r}: known names are {sorted(known)}")
    return known[name].config


def _own_class(kind: str, method: Any) -> Any:
    """`method` as an instance of its name's class: ProjectorConfig(name="perceiver") gets a Perceiver's defaults."""
    own = _method_class(kind, method.name)
    return method if type(method) is own else own.from_dict(method.to_dict())
