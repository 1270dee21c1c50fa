"""What every config shares, and the bases of the exchangeable methods: projectors, re-fusion blocks, pruners.

A method's config class stands in its own module and derives from one of these; `model/config.py` finds it by name."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from vr_jax.model.config import ImageConfig, VlmConfig


class ConfigError(ValueError):
    """A configuration that cannot be built; the message names the field, what it holds and what it may hold."""


class Config:
    """`to_dict` / `from_dict` for frozen dataclasses; nested configs are dicts, tuples are lists (JSON-safe)."""

    def to_dict(self) -> dict[str, Any]:
        return _plain(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Raises ConfigError naming an unknown field, and the known ones."""
        known = sorted(f.name for f in dataclasses.fields(cls))  # type: ignore[arg-type]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ConfigError(f"{cls.__name__}: unknown field(s) {unknown}; known fields: {known}")
        return cls(**{name: _tuples(cls.parse_field(name, value)) for name, value in values.items()})

    @classmethod
    def parse_field(cls, name: str, value: Any) -> Any:
        """A field's value from its JSON form; classes with nested configs override it."""
        del name
        return value


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value


def check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def check_choice(owner: str, name: str, value: Any, choices: tuple) -> None:
    check(value in choices, f"{owner}.{name} = {value!r}: expected one of {list(choices)}")


def check_increasing(owner: str, name: str, value: tuple[int, ...]) -> None:
    check(
        len(value) > 0 and list(value) == sorted(set(value)),
        f"{owner}.{name} = {value}: expected at least one, strictly increasing",
    )


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig(Config):
    """A token-compressing projector (paper, Table 1) and its stride s: s*s patches become one vision token.

    Projectors with further fields derive from it; VlmConfig turns a plain one into its projector's own class."""

    name: str = "pool"
    stride: int = 3

    def __post_init__(self):
        check(self.stride >= 1, f"ProjectorConfig.stride = {self.stride}: expected an integer >= 1")
        check(
            self.name != "mlp" or self.stride == 1,
            f"ProjectorConfig: projector 'mlp' does not compress, stride must be 1, found {self.stride}",
        )

    def cells_per_side(self, grid: int) -> int:
        """Vision tokens per side of a tile of grid x grid patches."""
        return grid // self.stride

    def feature_levels(self, model: VlmConfig) -> tuple[int, ...]:
        """Encoder hidden states that the projector reads; the first one is its main input."""
        return (model.vision_feature_layer,)

    def check_model(self, model: VlmConfig) -> None:
        """Raises ConfigError where the projector does not fit the rest of the model."""

    def flops_per_tile(self, model: VlmConfig) -> float:
        """Operations of the forward pass: two per multiply-add of its matrix products (methods.md 9.2)."""
        width, hidden = model.encoder.hidden_size, model.decoder.hidden_size
        return 2 * model.cells_per_tile * (width * hidden + hidden**2)


@dataclass(frozen=True, kw_only=True)
class RefusionConfig(Config):
    """What acts on the vision tokens between decoder layers, from the encoder's hidden states `levels`."""

    name: str
    # Decoder layers already run when a block acts, counted from 1 as in the paper ("after the first and fourth").
    insert_after: tuple[int, ...] = (1, 4)
    levels: tuple[int, ...] = (7, 15, 23)  # indices into the encoder's hidden states; 0 = patch embeddings

    def __post_init__(self):
        for name in ("insert_after", "levels"):
            check_increasing(type(self).__name__, name, getattr(self, name))

    @property
    def blocks(self) -> int:
        """Modules with weights of their own: one per insertion unless they share."""
        return len(self.insert_after)

    @property
    def pooled_text(self) -> str:
        """Which text the blocks may pool (`VisionRememberConfig.text_pool`)."""
        return "none"

    def check_model(self, model: VlmConfig) -> None:
        """Raises ConfigError where the re-fusion block does not fit the rest of the model."""

    def flops_per_tile(self, model: VlmConfig) -> float:
        """Operations of the forward pass of all insertions: two per multiply-add (methods.md 9.2)."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class PromptSize:
    """What a prompt holds, as far as a pruner's budget depends on it."""

    text: int  # tokens
    cells: int  # vision tokens that stand for a cell
    newlines: int
    tiles: int

    @property
    def vision(self) -> int:
        return self.cells + self.newlines


@dataclass(frozen=True, kw_only=True)
class PrunerConfig(Config):
    """Drops vision tokens of an already trained model at inference; adds no parameters."""

    name: str

    def cuts(self, model: VlmConfig) -> tuple[int, ...]:
        """Decoder layers already run where it looks at, or drops from, the stream: stage bounds."""
        raise NotImplementedError

    def feature_levels(self, model: VlmConfig) -> tuple[int, ...]:
        """Encoder hidden states it reads beyond the projector's."""
        del model
        return ()

    def check_model(self, model: VlmConfig) -> None:
        """Raises ConfigError where the pruner does not fit the model, or its budget cannot be met."""

    def adapt_image(self, image: ImageConfig) -> ImageConfig:
        """The image layout of the official code, for a model that was trained with another."""
        return image

    def kept(self, model: VlmConfig, layer: int, prompt: PromptSize) -> int:
        """Tokens of a prompt, text included, that decoder layer `layer` (counted from 0) sees, at most."""
        raise NotImplementedError
