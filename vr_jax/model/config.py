"""Frozen, validated descriptions of every part of the model. A checkpoint holds `LlavaConfig.to_dict()`."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal, Self


class ConfigError(ValueError):
    """A configuration that cannot be built; the message names the field, what it holds and what it may hold."""


class Config:
    """`to_dict` / `from_dict` for the dataclasses below; nested configs are dicts, tuples are lists (JSON-safe)."""

    def to_dict(self) -> dict[str, Any]:
        return _plain(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Raises ConfigError naming an unknown field, and the known ones."""
        fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(values) - set(fields))
        if unknown:
            raise ConfigError(f"{cls.__name__}: unknown field(s) {unknown}; known fields: {sorted(fields)}")
        return cls(**{name: _parse(cls, name, value) for name, value in values.items()})


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value


def _parse(cls: type, name: str, value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_parse(cls, name, v) for v in value)
    nested = _NESTED.get((cls.__name__, name))
    if nested is not None and value is not None and not dataclasses.is_dataclass(value):
        return nested.from_dict(dict(value))
    return value


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _check_choice(owner: str, name: str, value: Any, choices: tuple) -> None:
    _check(value in choices, f"{owner}.{name} = {value!r}: expected one of {list(choices)}")


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
        _check(
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
        _check(
            self.hidden_size % self.num_heads == 0,
            f"Qwen2Config.hidden_size = {self.hidden_size} is not divisible by num_heads = {self.num_heads}",
        )
        _check(
            self.num_heads % self.num_kv_heads == 0,
            f"Qwen2Config.num_heads = {self.num_heads} is not a multiple of num_kv_heads = {self.num_kv_heads}",
        )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig(Config):
    """Which token-compressing projector (paper, Table 1) and its stride s: s*s patches become one vision token."""

    name: str = "pool"
    stride: int = 3

    def __post_init__(self):
        _check(self.stride >= 1, f"ProjectorConfig.stride = {self.stride}: expected an integer >= 1")
        _check(
            self.name != "mlp" or self.stride == 1,
            f"ProjectorConfig: projector 'mlp' does not compress, stride must be 1, found {self.stride}",
        )


@dataclass(frozen=True, kw_only=True)
class VisionRememberConfig(Config):
    """Vision Remember (methods.md 5.4-5.9); each field with choices is one row of the ambiguity register 5.9."""

    name: Literal["vision_remember"] = "vision_remember"
    # Decoder layers already run when a block acts, counted from 1 as in the paper ("after the first and fourth").
    insert_after: tuple[int, ...] = (1, 4)
    levels: tuple[int, ...] = (7, 15, 23)  # indices into the encoder's hidden states; 0 = patch embeddings
    interaction: Literal["local"] = "local"
    cross_attention: Literal["absorbed", "plain"] = "absorbed"  # the same function; plain is the reference
    cross_heads: int | None = None  # None: one head per 128 channels
    self_attention: bool = True
    self_heads: int | None = None  # None: the decoder's query heads
    up: Literal["linear", "mlp"] = "linear"  # mlp: two layers up, out-projection straight to the decoder's width
    residual_gate: Literal["none", "tanh"] = "none"
    init: Literal["zero_out", "torch_default"] = "zero_out"
    feature_norm: Literal["per_level", "joint", "none"] = "per_level"
    order: Literal["cross_self", "self_cross"] = "cross_self"
    ffn_multiplier: int = 0  # 0: no feed-forward sub-layer
    self_scope: Literal["image", "tile"] = "image"
    newline_in_self: bool = False
    # Text that the guide token pools. all leaks the answers: tests only. all_human leaks them too where a sample has
    # several turns, as a later question has read the answers before it.
    text_pool: Literal["none", "first_turn", "all_human", "all"] = "first_turn"
    self_positions: Literal["none", "rope"] = "none"
    shared_weights: bool = False

    def __post_init__(self):
        owner = "VisionRememberConfig"
        for name, choices in {
            "name": ("vision_remember",),
            "interaction": ("local",),
            "cross_attention": ("absorbed", "plain"),
            "up": ("linear", "mlp"),
            "residual_gate": ("none", "tanh"),
            "init": ("zero_out", "torch_default"),
            "feature_norm": ("per_level", "joint", "none"),
            "order": ("cross_self", "self_cross"),
            "self_scope": ("image", "tile"),
            "text_pool": ("none", "first_turn", "all_human", "all"),
            "self_positions": ("none", "rope"),
        }.items():
            _check_choice(owner, name, getattr(self, name), choices)
        for name in ("insert_after", "levels"):
            value = getattr(self, name)
            _check(
                len(value) > 0 and list(value) == sorted(set(value)),
                f"{owner}.{name} = {value}: expected at least one, strictly increasing",
            )


@dataclass(frozen=True, kw_only=True)
class ImageConfig(Config):
    """How a picture becomes tiles and vision tokens (methods.md 1.2, 1.3)."""

    tile_size: int = 384  # pixels; must equal the encoder's image_size
    # square: squash to one tile; pad: pad to a square, one tile; anyres: base tile plus the best grid;
    # anyres_max: the same, and grids above max_tiles are shrunk bilinearly after the projector (OneVision).
    aspect_ratio: Literal["square", "pad", "anyres", "anyres_max"] = "anyres_max"
    grids: tuple[tuple[int, int], ...] = ()  # allowed (columns, rows), in LLaVA's order
    max_tiles: int = 9  # N of anyres_max_N
    unpad: bool = True  # drop padding rows/columns, end each row with the newline vector ("spatial_unpad")
    unpad_rounding: Literal["truncate", "round7"] = "truncate"  # round7: transformers' variant

    def __post_init__(self):
        _check_choice("ImageConfig", "aspect_ratio", self.aspect_ratio, ("square", "pad", "anyres", "anyres_max"))
        _check_choice("ImageConfig", "unpad_rounding", self.unpad_rounding, ("truncate", "round7"))
        _check(
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
    """One tile per picture; the paper's phase 1 uses the squashed one without newline."""
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
class LlavaConfig(Config):
    """A whole LVLM: encoder, projector, decoder, and at most one kind of interlude between decoder stages."""

    vision: SiglipConfig = field(default_factory=SiglipConfig)
    text: Qwen2Config = field(default_factory=Qwen2Config)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    interlude: VisionRememberConfig | None = None
    image: ImageConfig = field(default_factory=anyres9)
    vision_feature_layer: int = 23  # hidden state that feeds the projector; 0 = patch embeddings
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations; norms, softmax and loss stay float32
    attention: Literal["xla", "cudnn", "splash"] = "xla"
    remat: Literal["none", "full", "dots"] = "none"  # of the decoder's layers

    def __post_init__(self):
        _check_choice("LlavaConfig", "dtype", self.dtype, ("float32", "bfloat16"))
        _check_choice("LlavaConfig", "attention", self.attention, ("xla", "cudnn", "splash"))
        _check_choice("LlavaConfig", "remat", self.remat, ("none", "full", "dots"))
        _check(
            self.attention != "cudnn" or self.dtype == "bfloat16",
            f"LlavaConfig.attention = 'cudnn' with dtype = {self.dtype!r}: cuDNN attends in 'bfloat16' only",
        )
        grid, stride = self.vision.grid, self.projector.stride
        _check(
            grid % stride == 0,
            f"projector.stride = {stride} does not divide the encoder's {grid} x {grid} patch grid; "
            f"divisors: {[s for s in range(1, grid + 1) if grid % s == 0]}",
        )
        _check(
            self.image.tile_size == self.vision.image_size,
            f"image.tile_size = {self.image.tile_size} differs from vision.image_size = {self.vision.image_size}",
        )
        depth = self.vision.num_layers
        for name, level in [("vision_feature_layer", self.vision_feature_layer)] + [
            ("interlude.levels", level) for level in (self.interlude.levels if self.interlude else ())
        ]:
            _check(
                0 <= level <= depth,
                f"{name}: hidden state {level} does not exist, the encoder has 0..{depth}",
            )
        if self.interlude is not None:
            outside = [i for i in self.interlude.insert_after if not 1 <= i < self.text.num_layers]
            _check(
                not outside,
                f"interlude.insert_after = {self.interlude.insert_after}: {outside} outside the decoder; "
                f"expected values in 1..{self.text.num_layers - 1}",
            )
            _check(
                not self.image.may_interpolate,
                f"interlude {self.interlude.name!r} needs one feature window per vision token, but the image grids "
                "reach the bilinear branch of anyres_max; use grids of at most max_tiles tiles (preset anyres9)",
            )

    @property
    def cells_per_side(self) -> int:
        """n = grid / s: vision tokens per side of one tile."""
        return self.vision.grid // self.projector.stride

    @property
    def cells_per_tile(self) -> int:
        return self.cells_per_side**2

    @property
    def feature_levels(self) -> tuple[int, ...]:
        """Encoder hidden states the model reads, shallow to deep."""
        interlude = self.interlude.levels if self.interlude else ()
        return tuple(sorted({*interlude, self.vision_feature_layer}))

    @property
    def decoder_bounds(self) -> tuple[int, ...]:
        """Stage k of the decoder holds layers bounds[k] .. bounds[k + 1] - 1."""
        cuts = self.interlude.insert_after if self.interlude else ()
        return (0, *cuts, self.text.num_layers)

    @property
    def vision_bounds(self) -> tuple[int, ...]:
        """Stage k of the encoder holds blocks bounds[k] .. bounds[k + 1] - 1; cut after every level that is read."""
        return tuple(sorted({0, *self.feature_levels, self.vision.num_layers}))

    @property
    def text_pool(self) -> str:
        """Which text the guide token may pool; the data pipeline turns it into `guide_mask`."""
        return self.interlude.text_pool if self.interlude else "none"


_NESTED: dict[tuple[str, str], type[Config]] = {
    ("LlavaConfig", "vision"): SiglipConfig,
    ("LlavaConfig", "text"): Qwen2Config,
    ("LlavaConfig", "projector"): ProjectorConfig,
    ("LlavaConfig", "interlude"): VisionRememberConfig,
    ("LlavaConfig", "image"): ImageConfig,
}
