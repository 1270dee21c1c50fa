"""The description of a whole model: `VlmConfig`, and `ImageConfig` with its presets."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import jax.numpy as jnp

from vr_jax.errors import ConfigError
from vr_jax.fields import (
    MAX_FLOAT,
    Config,
    Distinct,
    NoEffect,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    check,
)
from vr_jax.model.decoders.transformer import TransformerConfig
from vr_jax.model.encoders.siglip import SiglipConfig
from vr_jax.model.projectors.pool import PoolConfig
from vr_jax.model.registry import (
    DecoderConfig,
    EncoderConfig,
    ProjectorConfig,
    PrunerConfig,
    RefusionConfig,
    method,
    names,
)
from vr_jax.model.spec import ModelSpec
from vr_jax.model.windows import window_capacity

__all__ = ["ConfigError", "ImageConfig", "Template", "VlmConfig", "anyres4", "anyres9", "anyres9_all36", "single_tile"]

Finite = Annotated[float, Range(-MAX_FLOAT, MAX_FLOAT)]
Rgb = tuple[Finite, Finite, Finite]
Deviation = tuple[PositiveFloat, PositiveFloat, PositiveFloat]
# The chat formats; "tokenizer" is the tokenizer's own chat template.
Template = Literal["qwen_1_5", "vicuna_v1", "llama_3", "mistral_instruct", "minicpm_v", "qwen2_vl", "tokenizer"]
# The chat formats for which LLaVA's code has targets outside the answers (docs/design/methods.md#labels).
QUIRKS = ("qwen_1_5", "llama_3")
# What an error advises for the layout of an encoder.
LAYOUT_MODES = {
    "square": "set image.aspect_ratio to 'square', 'pad', 'crop', 'anyres' or 'anyres_max'",
    "windows": "set image.aspect_ratio to 'native'",
    "raster": "set image.aspect_ratio to 'slices'",
}


@dataclass(frozen=True, kw_only=True)
class ImageConfig(Config):
    """How an image becomes tiles and vision tokens (docs/design/methods.md#image-preprocessing and #anyres).

    Attributes:
        tile_size: Pixels per side of a tile slot; must equal the encoder's `image_size`.
        aspect_ratio: "square" squashes the image to one tile. "pad" pads it to a square, which becomes one tile.
            "crop" cuts one tile out of its middle, as CLIP's image processor does. "anyres" makes a base tile and the
            tiles of the best grid. "anyres_max" does the same, and shrinks the vision tokens of a grid above
            `max_tiles` tiles bilinearly after the projector, as LLaVA-OneVision does. "native" keeps about the image's
            own size and makes tiles of the encoder's attention windows, as Qwen2.5-VL does. "slices" makes an overview
            and slices of any aspect ratio, as MiniCPM-V 2.0 does.
        grids: The grids (columns, rows) that "anyres" and "anyres_max" choose from, in the order of preference.
        max_tiles: N of LLaVA-OneVision's `anyres_max_N`.
        unpad: Whether the rows and columns of the padding are dropped and every row ends with the newline vector.
        unpad_rounding: How the kept rows and columns are rounded. "truncate" is LLaVA's; "round7", which rounds to
            seven digits first, is that of transformers.
        min_pixels: The fewest pixels that "native" resizes an image to.
        max_pixels: The most pixels that "native" resizes an image to.
        slice_size: The side of a square with about as many pixels as a slice of "slices".
        max_slices: The most slices that "slices" cuts an image into, beside the overview.
        image_mean: Mean of the normalisation, for red, green and blue; that of SigLIP by default.
        image_std: Standard deviation of the normalisation, in the same way.
        rescale_factor: What a pixel's value 0..255 is multiplied by before the mean is subtracted.
        resample: Pillow's filter that resizes images.
    """

    no_effect: ClassVar = (
        NoEffect(("grids",), "aspect_ratio", lambda own: not own.is_anyres, "an image is one tile"),
        NoEffect(
            ("max_tiles",),
            "aspect_ratio",
            lambda own: own.aspect_ratio != "anyres_max",
            "only 'anyres_max' shrinks the vision tokens of large grids",
        ),
        NoEffect(("max_tiles",), "unpad", lambda own: not own.unpad, "without unpad no vision tokens are shrunk"),
        NoEffect(("unpad_rounding",), "aspect_ratio", lambda own: not own.is_anyres, "no padding is dropped"),
        NoEffect(("unpad_rounding",), "unpad", lambda own: not own.unpad, "no padding is dropped"),
        NoEffect(
            ("min_pixels", "max_pixels"),
            "aspect_ratio",
            lambda own: own.aspect_ratio != "native",
            "only 'native' keeps about the image's own size",
        ),
        NoEffect(
            ("slice_size", "max_slices"),
            "aspect_ratio",
            lambda own: own.aspect_ratio != "slices",
            "only 'slices' cuts slices of any aspect ratio",
        ),
    )

    tile_size: PositiveInt = 384
    aspect_ratio: Literal["square", "pad", "crop", "anyres", "anyres_max", "native", "slices"] = "anyres_max"
    grids: Annotated[tuple[tuple[PositiveInt, PositiveInt], ...], Distinct()] = ()
    max_tiles: PositiveInt = 9
    unpad: bool = True
    unpad_rounding: Literal["truncate", "round7"] = "truncate"
    min_pixels: PositiveInt = 56 * 56
    max_pixels: PositiveInt = 12_845_056
    slice_size: PositiveInt = 448
    max_slices: PositiveInt = 9
    image_mean: Rgb = (0.5, 0.5, 0.5)
    image_std: Deviation = (0.5, 0.5, 0.5)
    rescale_factor: PositiveFloat = 1 / 255
    resample: Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"] = "bicubic"

    def __post_init__(self) -> None:
        """Checks the fields."""
        super().__post_init__()
        check(
            bool(self.grids) or not self.is_anyres,
            f"ImageConfig.grids is empty: aspect_ratio {self.aspect_ratio!r} needs at least one (columns, rows)",
        )
        check(
            not (self.unpad and self.aspect_ratio in ("native", "slices")),
            f"ImageConfig.unpad = True with aspect_ratio {self.aspect_ratio!r}: these images have no padding and no "
            "newline vectors; set unpad to False",
        )
        check(
            self.min_pixels <= self.max_pixels,
            f"ImageConfig.min_pixels = {self.min_pixels} is above max_pixels = {self.max_pixels}",
        )

    @property
    def pixel_scale(self) -> Rgb:
        """What the value 0..255 of a pixel is multiplied by, for each channel."""
        red, green, blue = (self.rescale_factor / deviation for deviation in self.image_std)
        return red, green, blue

    @property
    def pixel_shift(self) -> Rgb:
        """What is then subtracted."""
        red, green, blue = (mean / std for mean, std in zip(self.image_mean, self.image_std, strict=True))
        return red, green, blue

    @property
    def pad_colour(self) -> tuple[int, int, int]:
        """The colour that fills an image up to a square: the mean, as LLaVA and transformers round it."""
        red, green, blue = (min(255, max(0, int(255 * mean))) for mean in self.image_mean)
        return red, green, blue

    @property
    def is_anyres(self) -> bool:
        """Whether an image may have several tiles."""
        return self.aspect_ratio in ("anyres", "anyres_max")

    @property
    def max_tiles_per_image(self) -> int:
        """Tiles of the largest grid plus the base tile. It has no meaning for "native", whose tiles are many."""
        if self.aspect_ratio == "slices":
            return 1 + self.max_slices
        return 1 + max(w * h for w, h in self.grids) if self.is_anyres else 1

    @property
    def min_tiles_per_image(self) -> int:
        """The fewest tiles that an image has."""
        if self.aspect_ratio == "native":
            return -(-self.min_pixels // self.tile_size**2)
        return 1 + min(w * h for w, h in self.grids) if self.is_anyres else 1

    @property
    def may_interpolate(self) -> bool:
        """Whether a grid exists whose vision tokens are shrunk bilinearly, so that they leave the grid of cells.

        LLaVA-OneVision shrinks a map of h x w cells where sqrt(h * w / (max_tiles * u^2)) > 1.1, u being the cells per
        side of a tile.
        """
        if self.aspect_ratio != "anyres_max":
            return False
        return any(math.sqrt(w * h / self.max_tiles) > 1.1 for w, h in self.grids)


def single_tile(
    tile_size: int = 384,
    *,
    aspect_ratio: Literal["square", "pad", "crop", "anyres", "anyres_max"] = "square",
    unpad: bool = False,
) -> ImageConfig:
    """One tile per image. The paper's first phase squashes the image and has no newline vector."""
    return ImageConfig(tile_size=tile_size, aspect_ratio=aspect_ratio, unpad=unpad)


def anyres4(tile_size: int = 384) -> ImageConfig:
    """The five grids of LLaVA-NeXT: at most four tiles and the base tile (the paper's ablations)."""
    grids = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
    return ImageConfig(tile_size=tile_size, aspect_ratio="anyres", grids=grids)


def anyres9(tile_size: int = 384) -> ImageConfig:
    """Every grid of at most nine tiles, the paper's main setting (docs/design/methods.md#anyres).

    No grid is so large that its vision tokens are shrunk.
    """
    grids = tuple((w, h) for w in range(1, 7) for h in range(1, 7) if w * h <= 9)
    return ImageConfig(tile_size=tile_size, aspect_ratio="anyres_max", grids=grids)


def anyres9_all36(tile_size: int = 384) -> ImageConfig:
    """The 36 grids of LLaVA-OneVision up to 6 x 6, of which large ones are shrunk bilinearly."""
    grids = tuple((w, h) for w in range(1, 7) for h in range(1, 7))
    return ImageConfig(tile_size=tile_size, aspect_ratio="anyres_max", grids=grids)


@dataclass(frozen=True, kw_only=True)
class VlmConfig(Config):
    """A whole vision-language model. At most one of `refusion` and `pruning` is set.

    Attributes:
        encoder: The vision encoder.
        decoder: The text decoder.
        projector: The projector, which compresses features to vision tokens.
        refusion: The re-fusion blocks between decoder layers, or None.
        pruning: The pruner, or None. A pruner acts at inference only.
        image: How images become tiles.
        vision_feature_layer: The encoder's hidden state that feeds the projector; 0 is the patch embeddings.
        image_token_id: The token id that stands for a vision token in the prompts of transformers' class of the model,
            or None for a model of LLaVA's code, whose decoder is given embeddings. It has a meaning for the repetition
            penalty, which counts what the decoder is given as ids (docs/design/decisions.md#decision-29).
        template: The chat format that the model speaks (docs/data.md#chat-formats). Training, questions, chat and
            evaluation write it.
        dtype: Type of the activations. Norms, softmax and the loss are computed in float32.
        attention: Backend of the encoder's and the decoder's attention. "auto" takes the fastest one for the platform
            and the shapes (`vr_jax.kernels.attention`).
        remat: What the decoder's layers recompute in the backward pass: nothing, everything, or all but the matrix
            products.
    """

    encoder: EncoderConfig = field(default_factory=SiglipConfig)
    decoder: DecoderConfig = field(default_factory=TransformerConfig)
    projector: ProjectorConfig = field(default_factory=PoolConfig)
    refusion: RefusionConfig | None = None
    pruning: PrunerConfig | None = None
    image: ImageConfig = field(default_factory=anyres9)
    vision_feature_layer: NonNegativeInt = 23
    image_token_id: NonNegativeInt | None = None
    template: Template = "qwen_1_5"
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Literal["auto", "xla", "blocked", "cudnn", "splash"] = "auto"
    remat: Literal["none", "full", "dots"] = "none"

    def __post_init__(self) -> None:
        """Checks the fields and that the methods fit together."""
        super().__post_init__()
        check(
            self.attention != "cudnn" or self.dtype == "bfloat16",
            f"VlmConfig.attention = 'cudnn' with dtype = {self.dtype!r}: cuDNN attends in 'bfloat16' only",
        )
        check(
            self.image_token_id is None or self.image_token_id < self.decoder.vocab_size,
            f"image_token_id = {self.image_token_id} is outside the vocabulary, decoder.vocab_size = "
            f"{self.decoder.vocab_size}; expected a smaller number, or None",
        )
        grid, stride = self.encoder.grid, self.projector.stride
        check(
            grid % stride == 0 or self.encoder.layout == "raster",
            f"projector.stride = {stride} does not divide the encoder's {grid} x {grid} patch grid; set one of its "
            f"divisors: {[s for s in range(1, grid + 1) if grid % s == 0]}",
        )
        check(
            self.image.tile_size == self.encoder.image_size,
            f"image.tile_size = {self.image.tile_size} differs from encoder.image_size = {self.encoder.image_size}; "
            "set both to the same number of pixels",
        )
        self._check_layout()
        self._check_image_size()
        self._check_levels("vision_feature_layer", (self.vision_feature_layer,))
        self._check_levels("projector.levels", self.projector.feature_levels(self.spec))
        self.projector.check_model(self.spec)
        if self.refusion is not None:
            self._check_refusion(self.refusion)
        if self.pruning is not None:
            self._check_pruning(self.pruning)

    def _check_layout(self) -> None:
        """Checks that the images, the encoder and the methods that read it agree on how patches lie in tiles."""
        layout, mode = self.encoder.layout, self.image.aspect_ratio
        expected = {"native": "windows", "slices": "raster"}.get(mode, "square")
        check(
            layout == expected,
            f"image.aspect_ratio = {mode!r} with the encoder {self.encoder.name!r}: the images make tiles of layout "
            f"{expected!r}, and the encoder reads {layout!r}; {LAYOUT_MODES[layout]}",
        )
        for name, one in (("projector", self.projector), ("refusion", self.refusion)):
            if one is not None and layout not in one.layouts:
                fitting = ", ".join(repr(n) for n in names(name) if layout in method(name, n).layouts)
                raise ConfigError(
                    f"{name} {one.name!r} with the encoder {self.encoder.name!r}: it reads tiles of the layout "
                    f"{' or '.join(map(repr, one.layouts))}, and the encoder gives {layout!r}; set {name}.name to one "
                    f"of {fitting}"
                )
        check(
            self.pruning is None or layout == "square",
            f"pruning {self.pruning and self.pruning.name!r} with the encoder {self.encoder.name!r}: the pruners are "
            "defined for square tiles, as LLaVA has them",
        )
        check(
            self.pruning is None or not self.decoder.multi_axis,
            f"pruning {self.pruning and self.pruning.name!r} with rotary positions of several axes: the pruners are "
            "defined for positions that count tokens; set decoder.rope_sections to None",
        )

    def _check_image_size(self) -> None:
        """Checks that the sizes that images are resized to fit the tiles."""
        patch, image = self.encoder.patch_size, self.image
        rows = max(1, round(image.slice_size / patch))
        check(
            image.aspect_ratio != "slices" or rows <= self.encoder.grid,
            f"image.slice_size = {image.slice_size}: a square slice has {rows} x {rows} patches of {patch} pixels, but "
            f"a tile slot has room for {self.encoder.grid} x {self.encoder.grid}; lower it, or raise image.tile_size "
            "and encoder.image_size",
        )
        cell = patch * self.projector.stride
        check(
            image.aspect_ratio != "native" or image.max_pixels >= cell**2,
            f"image.max_pixels = {image.max_pixels}: an image has at least one cell of {cell} x {cell} pixels; set at "
            f"least {cell**2}",
        )

    def _check_levels(self, name: str, levels: tuple[int, ...]) -> None:
        depth = self.encoder.last_level
        for level in levels:
            check(
                0 <= level <= depth,
                f"{name}: hidden state {level} does not exist, the encoder has 0..{depth}; set {name} within these",
            )

    def _check_refusion(self, refusion: RefusionConfig) -> None:
        self._check_levels("refusion.levels", refusion.levels)
        outside = [i for i in refusion.insert_after if not 1 <= i <= self.decoder.num_layers]
        check(
            not outside,
            f"refusion.insert_after = {refusion.insert_after}: {outside} outside the decoder; "
            f"expected values in 1..{self.decoder.num_layers}",
        )
        check(
            not self.image.may_interpolate,
            f"re-fusion block {refusion.name!r} needs one feature window per vision token, but the image grids "
            "reach the bilinear branch of anyres_max; use grids of at most max_tiles tiles (preset anyres9)",
        )
        windows = self.encoder.grid // self.projector.stride
        check(
            self.cells_per_side == windows or self.encoder.layout == "raster",
            f"re-fusion block {refusion.name!r} needs one feature window per vision token: projector "
            f"{self.projector.name!r} makes {self.cells_per_side} x {self.cells_per_side} tokens, stride "
            f"{self.projector.stride} makes {windows} x {windows} windows; set a stride that gives as many",
        )
        refusion.check_model(self.spec)

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
        pruning.check_model(self.spec)
        depth = self.decoder.num_layers
        outside = [i for i in pruning.cuts(self.spec) if not 0 <= i < depth]
        check(not outside, f"pruning {pruning.name!r}: layers {outside} outside the decoder; expected 0..{depth - 1}")
        self._check_levels("pruning", pruning.feature_levels(self.spec))

    @property
    def spec(self) -> ModelSpec:
        """The facts that the methods may read."""
        return ModelSpec(
            grid=self.encoder.grid,
            encoder_width=self.encoder.hidden_size,
            encoder_layers=self.encoder.num_layers,
            decoder_width=self.decoder.hidden_size,
            decoder_layers=self.decoder.num_layers,
            decoder_heads=self.decoder.num_heads,
            rope_theta=self.decoder.rope_theta,
            projector=self.projector.name,
            stride=self.projector.stride,
            cells_per_side=self.cells_per_side,
            feature_level=self.vision_feature_layer,
            attention=self.attention,
            remat=self.remat,
            dtype=jnp.dtype(self.dtype),
            layout=self.encoder.layout,
            multi_axis=self.decoder.multi_axis,
            encoder=self.encoder.name,
            encoder_gives_attention=self.encoder.gives_attention,
            window_slots=self.window_slots,
            pixel_scale=self.image.pixel_scale,
            pixel_shift=self.image.pixel_shift,
        )

    @property
    def cells_per_side(self) -> int:
        """Vision tokens per side of one tile."""
        return self.projector.cells_per_side(self.encoder.grid)

    @property
    def cells_per_tile(self) -> int:
        """Vision tokens of one tile."""
        return self.cells_per_side**2

    @property
    def window_slots(self) -> int | None:
        """Patch slots of an adaptive window, for slices of any grid; None where all windows have the same size."""
        if self.encoder.layout != "raster":
            return None
        return window_capacity(self.encoder.grid**2, self.cells_per_side)

    @property
    def min_tokens_per_image(self) -> int:
        """The fewest vision tokens that an image has, where none are lost with the padding."""
        if self.image.aspect_ratio != "native":
            return self.cells_per_tile
        return max(1, self.image.min_pixels * self.cells_per_tile // self.image.tile_size**2)

    @property
    def feature_levels(self) -> tuple[int, ...]:
        """The encoder's hidden states that the model reads, shallow to deep."""
        refusion = self.refusion.levels if self.refusion else ()
        pruning = self.pruning.feature_levels(self.spec) if self.pruning else ()
        return tuple(
            sorted({*refusion, *pruning, *self.projector.feature_levels(self.spec), self.vision_feature_layer})
        )

    @property
    def decoder_bounds(self) -> tuple[int, ...]:
        """Stage k of the decoder holds the layers bounds[k] .. bounds[k + 1] - 1."""
        cuts = self.refusion.insert_after if self.refusion else ()
        cuts += self.pruning.cuts(self.spec) if self.pruning else ()
        return tuple(sorted({0, *cuts, self.decoder.num_layers}))

    @property
    def encoder_bounds(self) -> tuple[int, ...]:
        """Stage k of the encoder holds the layers bounds[k] .. bounds[k + 1] - 1.

        Every level that is read is a bound, and so are the encoder's `extra_bounds`.
        """
        depth = self.encoder.num_layers
        levels = (min(level, depth) for level in self.feature_levels)
        return tuple(sorted({0, *levels, *self.encoder.extra_bounds, depth}))

    @property
    def batch_fields(self) -> frozenset[str]:
        """The optional fields of `Batch` that the model's batches have."""
        names = {
            "vision_cells": self.image.may_interpolate,
            "vision_weights": self.image.may_interpolate,
            "grid_positions": self.decoder.multi_axis,
            "tile_extent": self.encoder.layout != "square",
            "tile_origin": self.encoder.layout == "windows",
        }
        return frozenset(name for name, there in names.items() if there)

    @property
    def text_pool(self) -> str:
        """The text that the text-guided token may pool; the data pipeline turns it into `text_token_mask`."""
        return self.refusion.pooled_text if self.refusion else "none"
