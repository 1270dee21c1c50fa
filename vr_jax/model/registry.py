"""The five kinds of exchangeable methods, and the registry in which a method's config class enters itself by name.

A method is one file: its frozen config dataclass, its modules, its shapes and its FLOP count. The config class derives
from the base of its kind and states its name, which registers it::

    @dataclass(frozen=True, kw_only=True)
    class PoolConfig(ProjectorConfig, name="pool"):
        ...

A method reads of the rest of the model only what `ModelSpec` holds. This module imports no method; `discover` imports
the files of the five folders by name. See docs/methods.md for an example of each kind.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import json
import pkgutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, Self, cast, runtime_checkable

from flax import nnx
from jaxtyping import Array, Float, UInt8

from vr_jax.errors import ConfigError
from vr_jax.fields import Config, NonNegativeInt, PositiveFloat, PositiveInt, check, check_increasing
from vr_jax.model.batch import Batch, TilePlaces
from vr_jax.model.decoders.stages import DecoderModule, StageHook
from vr_jax.model.spec import ModelSpec, PromptSize
from vr_jax.sharding import Rules, forget_rules, register_rules

# The field of VlmConfig that holds a method of each kind, and the folder of vr_jax.model with the files of that kind.
FOLDERS: dict[str, str] = {
    "encoder": "encoders",
    "projector": "projectors",
    "decoder": "decoders",
    "refusion": "refusion",
    "pruning": "pruning",
}

# How the patches of an image lie in tiles; see `EncoderConfig.layout`.
Layout = Literal["square", "windows", "raster"]

_methods: dict[str, dict[str, type[MethodConfig]]] = {kind: {} for kind in FOLDERS}


class MethodConfig(Config):
    """Base of all method configs: it registers subclasses by name and keeps the name in their JSON form.

    Attributes:
        kind: One of the keys of `FOLDERS`.
        name: The name that chooses the method in a config file.
        sharding_rules: Rules for parameters whose names are not in the table of `vr_jax.sharding`: patterns of the path
            within the encoder, projector, decoder or refusion module, and how the axes are cut.
    """

    kind: ClassVar[str]
    name: ClassVar[str]
    sharding_rules: ClassVar[Rules] = ()

    def __init_subclass__(cls, *, name: str | None = None, kind: str | None = None, **options: Any) -> None:
        """Registers a method.

        Args:
            name: The method's name.
            kind: Given by the base of a kind in place of a name.
            **options: Passed on.

        Raises:
            TypeError: The name is missing, or another class of the same kind has it.
        """
        super().__init_subclass__(**options)
        if kind is not None:
            cls.kind = kind
            return
        if not name:
            raise TypeError(f"{cls.__qualname__} has no name: write class {cls.__qualname__}(..., name=...)")
        known = _methods[cls.kind]
        if name in known:
            other = known[name]
            raise TypeError(
                f"{cls.__module__}.{cls.__qualname__}: the {cls.kind} {name!r} exists already, "
                f"it is {other.__module__}.{other.__qualname__}; choose another name"
            )
        cls.name = name
        known[name] = cls
        register_rules(cls.kind, cls.sharding_rules, _owner(cls))

    def to_dict(self) -> dict[str, Any]:
        """The name and the fields as a dictionary that JSON can hold."""
        return {"name": self.name, **super().to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str | None = None) -> Self:
        """Builds the config from what `to_dict` returns.

        Args:
            values: Field names and JSON-safe values. The base of a kind needs a `name`, which chooses the class; for
                the class of a method it may be absent.
            where: What the error messages call this config.

        Raises:
            ConfigError: The name is absent, unknown or that of another method; or a field is unknown or has a wrong
                value.
        """
        own = getattr(cls, "name", None)
        where = where or (cls.kind if own is None else cls.__name__)
        fields = {key: value for key, value in values.items() if key != "name"}
        name = values.get("name", own)
        if own is None:
            return cast(Self, method(cls.kind, name, where).from_dict(fields, where))
        check(name == own, f"{where}.name = {name!r}: {cls.__name__} is the {cls.kind} {own!r}")
        return super().from_dict(fields, where)


@runtime_checkable
class EncoderModule(Protocol):
    """The interface of an encoder's module."""

    def __call__(
        self, pixels: UInt8[Array, "*B H W 3"], levels: tuple[int, ...], places: TilePlaces | None = None
    ) -> tuple[Float[Array, "*B cells patches D"], ...]:
        """The hidden states of tiles, in the order of `EncoderConfig.layout`.

        Args:
            pixels: The tiles.
            levels: Numbers of hidden states; 0 is the patch embeddings.
            places: Where the patches of the tiles lie; None for a layout of full squares.

        Returns:
            One array for each of `levels`.
        """
        ...

    def received_attention(self, hidden: Float[Array, "*B cells patches D"]) -> Float[Array, "*B heads cells patches"]:
        """The attention that each patch receives in the last layer, averaged over the patches that attend; float32.

        Args:
            hidden: The input of that layer.

        Returns:
            The attention of each head; over the patches of a tile it sums to one.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(MethodConfig, kind="encoder"):
    """A vision encoder, which maps tiles to feature levels.

    Attributes:
        layout: How the patches of an image lie in tiles. "square": each tile is a full square, whose hidden states are
            (tiles, cells, patches of a cell, channels), window-major. "windows": the tiles of an image are the
            attention windows of one grid of patches, in the same order; those at the right and bottom edge hold fewer
            patches. "raster": a tile holds the patches of one slice of any grid, row by row, and its hidden states are
            (tiles, 1, patches, channels); unused slots follow.
        hidden_size: Channels of the hidden states.
        num_layers: Number of layers.
        image_size: Pixels per side of a tile.
        patch_size: Pixels per side of a patch.
        gives_attention: Whether the module has `EncoderModule.received_attention`, by which VisPruner ranks patches.
    """

    layout: ClassVar[Layout] = "square"
    gives_attention: ClassVar[bool] = True

    hidden_size: PositiveInt
    num_layers: PositiveInt
    image_size: PositiveInt
    patch_size: PositiveInt

    @property
    def grid(self) -> int:
        """Patches per side of a tile."""
        raise NotImplementedError

    @property
    def last_level(self) -> int:
        """The number of the last hidden state that the encoder gives; 0 is the patch embeddings."""
        return self.num_layers

    @property
    def extra_bounds(self) -> tuple[int, ...]:
        """Bounds of stages that the encoder needs beside those of the levels that are read."""
        return ()

    def flops_per_tile(self, layers: int) -> float:
        """Operations of the forward pass of one full tile through the first `layers` layers, two per multiply-add."""
        raise NotImplementedError

    def flops_per_image(self, layers: int, tiles: int) -> float:
        """Operations for all full tiles of one image, whose patches may attend to one another."""
        return tiles * self.flops_per_tile(layers)

    def build(self, spec: ModelSpec, *, bounds: tuple[int, ...], rngs: nnx.Rngs) -> EncoderModule:
        """The encoder's module.

        Args:
            spec: The model that it belongs to.
            bounds: Stage k holds the layers bounds[k] .. bounds[k + 1] - 1; every level that is read is a bound,
                and so are the encoder's `extra_bounds`.
            rngs: Random state of the initial values.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig(MethodConfig, kind="projector"):
    """A token-compressing projector (paper, Table 1).

    Attributes:
        layouts: The layouts of encoders (`EncoderConfig.layout`) that the projector reads.
        stride: Patches per side of a window; stride * stride patches become one vision token.
    """

    layouts: ClassVar[tuple[Layout, ...]] = ("square",)

    stride: PositiveInt = 3

    def cells_per_side(self, grid: int) -> int:
        """Vision tokens per side of a tile of grid x grid patches."""
        return grid // self.stride

    def feature_levels(self, spec: ModelSpec) -> tuple[int, ...]:
        """The encoder's hidden states that the projector reads; the first is its main input."""
        return (spec.feature_level,)

    def check_model(self, spec: ModelSpec) -> None:
        """Checks that the projector fits the model.

        Raises:
            ConfigError: It does not fit.
        """

    def flops_per_tile(self, spec: ModelSpec) -> float:
        """Operations of the forward pass of one tile, two per multiply-add of a matrix product.

        The default is that of two linear layers on every vision token.
        """
        return 2 * spec.cells_per_tile * (spec.encoder_width * spec.decoder_width + spec.decoder_width**2)

    def build(self, spec: ModelSpec, *, rngs: nnx.Rngs) -> Any:
        """The projector's module.

        It maps one array (..., cells, patches of a cell, encoder width) for each of `feature_levels` to vision tokens
        (..., cells, decoder width). For the layout "raster" it is called with `places=`, a `TilePlaces`, besides.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(MethodConfig, kind="decoder"):
    """A text decoder, whose layers run in stages.

    Attributes:
        vocab_size: Number of tokens.
        hidden_size: Channels of the hidden states.
        num_layers: Number of layers.
        num_heads: Query heads of a layer.
        num_kv_heads: Key and value heads of a layer.
        rope_theta: Base of the rotary frequencies.
        tie_word_embeddings: Whether the output matrix is the transposed embedding.
    """

    vocab_size: PositiveInt
    hidden_size: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    rope_theta: PositiveFloat
    tie_word_embeddings: bool

    @property
    def multi_axis(self) -> bool:
        """Whether rotary positions have a time, a row and a column axis (`Batch.grid_positions`)."""
        return False

    def flops_per_token(self) -> float:
        """Operations of the forward pass of one token through the linear layers, two per multiply-add."""
        raise NotImplementedError

    def flops_per_pair(self) -> float:
        """Operations of the attention of all layers for one query and one visible key."""
        raise NotImplementedError

    def build(self, spec: ModelSpec, *, bounds: tuple[int, ...], rngs: nnx.Rngs) -> DecoderModule:
        """The decoder's module.

        Args:
            spec: The model that it belongs to.
            bounds: Stage k holds the layers bounds[k] .. bounds[k + 1] - 1.
            rngs: Random state of the initial values.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class RefusionConfig(MethodConfig, kind="refusion"):
    """Re-fusion blocks, which update the vision tokens between decoder layers from the encoder's hidden states.

    Attributes:
        layouts: The layouts of encoders (`EncoderConfig.layout`) that the blocks read.
        insert_after: Numbers of decoder layers that have run when a block acts, counted from 1 as in the paper ("after
            the first and fourth layer").
        levels: The encoder's hidden states that the blocks read; 0 is the patch embeddings.
    """

    layouts: ClassVar[tuple[Layout, ...]] = ("square",)

    insert_after: tuple[PositiveInt, ...] = (1, 4)
    levels: tuple[NonNegativeInt, ...] = (7, 15, 23)

    def __post_init__(self) -> None:
        """Checks the fields."""
        super().__post_init__()
        for field in ("insert_after", "levels"):
            check_increasing(f"{type(self).__name__}.{field}", getattr(self, field))

    @property
    def blocks(self) -> int:
        """Number of blocks with weights of their own: one per insertion unless insertions share theirs."""
        return len(self.insert_after)

    @property
    def pooled_text(self) -> str:
        """The text that the blocks may pool, one of the choices of `VisionRememberConfig.text_pool`."""
        return "none"

    def check_model(self, spec: ModelSpec) -> None:
        """Checks that the blocks fit the model.

        Raises:
            ConfigError: They do not fit.
        """

    def flops_per_tile(self, spec: ModelSpec) -> float:
        """Operations of the forward pass of all insertions for one tile, two per multiply-add."""
        raise NotImplementedError

    def build_features(self, spec: ModelSpec, *, rngs: nnx.Rngs) -> Any:
        """The module that prepares the features for all blocks, run once per forward pass; None if there is none.

        It maps a tuple of the hidden states `levels`, each (B, T, cells, patches of a cell, encoder width), to what the
        blocks find in `VisionContext.features`. Without it they find the tuple.
        """
        del spec, rngs

    def build(self, spec: ModelSpec, index: int, *, rngs: nnx.Rngs) -> Any:
        """The block of insertion `index`, a module that maps (DecoderInputs, VisionContext) to DecoderInputs."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ForwardPass:
    """The modules and inputs of one forward pass that a pruner may use.

    Attributes:
        encoder: The encoder.
        decoder: The decoder.
        levels: The encoder's hidden states by number, each (B, T, cells, patches of a cell, encoder width).
        batch: The batch.
        lengths: The row length of every decoder stage, which holds the tokens that `PrunerConfig.kept` counts; None if
            rows keep their length.
    """

    encoder: EncoderModule
    decoder: DecoderModule
    levels: Mapping[int, Float[Array, "B T C S Dv"]]
    batch: Batch
    lengths: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class PrunerConfig(MethodConfig, kind="pruning"):
    """A pruner, which drops vision tokens of an already trained model at inference and has no parameters."""

    def cuts(self, spec: ModelSpec) -> tuple[int, ...]:
        """Numbers of decoder layers that have run where the pruner ranks or drops tokens; stages end there."""
        raise NotImplementedError

    def feature_levels(self, spec: ModelSpec) -> tuple[int, ...]:
        """The encoder's hidden states that the pruner reads beyond the projector's."""
        del spec
        return ()

    def check_model(self, spec: ModelSpec) -> None:
        """Checks that the pruner fits the model and that its budget can be met.

        Raises:
            ConfigError: One of these fails.
        """

    def adapt_image(self, image: Any) -> Any:
        """The image layout of the official code (an `ImageConfig`), for a model that was trained with another one."""
        return image

    def kept(self, spec: ModelSpec, layer: int, prompt: PromptSize) -> int:
        """The largest number of a prompt's tokens, text included, that decoder layer `layer` (counted from 0) reads."""
        raise NotImplementedError

    def build(self, spec: ModelSpec, forward: ForwardPass) -> StageHook[Any]:
        """The stage hook that prunes in one forward pass.

        Rows of its inputs hold one segment each and are aligned to the right, and stay so. Where `forward.lengths` is
        given, the hook cuts the rows of stage k to lengths[k] slots; otherwise dropped tokens stay as padding.
        """
        raise NotImplementedError


def read_pruner(choice: str | Mapping[str, Any] | None, where: str = "pruning") -> PrunerConfig | None:
    """Returns the pruner that a setting or a flag chooses.

    Args:
        choice: The name of a pruner, for its default settings; or its fields, `name` among them, as a mapping or as the
            text of a JSON object. None chooses none.
        where: What error messages call the setting.

    Raises:
        ConfigError: The choice is none of these.
    """
    if choice is None:
        return None
    fields: Any = choice
    if isinstance(choice, str):
        try:
            fields = json.loads(choice) if choice.lstrip().startswith("{") else {"name": choice.strip()}
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where} {choice[:200]!r} is no valid JSON object: {error}") from None
    return PrunerConfig.from_dict(dict(fields), where)


@functools.cache
def discover() -> None:
    """Imports every file of the five method folders, so that the methods in them are registered.

    This is the only dynamic import of the model package. Calling it again does nothing.
    """
    for folder in FOLDERS.values():
        package = importlib.import_module(f"vr_jax.model.{folder}")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")


def names(kind: str) -> list[str]:
    """The names of all methods of a kind (a key of `FOLDERS`), sorted."""
    discover()
    return sorted(_methods[kind])


def method(kind: str, name: Any, where: str | None = None) -> type[Any]:
    """The config class of a method.

    Args:
        kind: A key of `FOLDERS`.
        name: The method's name.
        where: What the error message calls the config, e.g. "config.model.projector"; by default the kind.

    Raises:
        ConfigError: There is no such method; the message lists the known names.
    """
    known = names(kind)
    if name in known:
        return _methods[kind][name]
    near = difflib.get_close_matches(str(name), known, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(f"{where or kind}.name = {name!r}: {hint}known names are {', '.join(known)}")


@contextmanager
def registered_temporarily() -> Iterator[None]:
    """Forgets the methods that are registered inside the context when it ends; for tests."""
    discover()
    before = {kind: dict(known) for kind, known in _methods.items()}
    try:
        yield
    finally:
        for kind, known in before.items():
            for name in _methods[kind].keys() - known.keys():
                forget_rules(_owner(_methods[kind][name]))
        _methods.update(before)


def _owner(method_class: type[MethodConfig]) -> str:
    """The name of a method in the messages of `vr_jax.sharding`."""
    return f"the {method_class.kind} {method_class.name!r}"
