"""What the parts of the page pass to each other: what a user chooses, and what is shown of an answer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal

from vr_jax.app.figure import Figure
from vr_jax.data.processor import Processor
from vr_jax.fields import Config, PositiveInt
from vr_jax.inference import Generator, Sampling

DType = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Variant(Config):
    """How a checkpoint is loaded.

    Attributes:
        pruning: The pruner, as `with_pruning` takes it, or None for none.
        dtype: The type of parameters and activations, or None for that which is stored.
    """

    pruning: str | None = None
    dtype: DType | None = None


# Loads a checkpoint: a context whose value is the generator and the processor of one variant of it.
Loader = Callable[[Variant], AbstractContextManager[tuple[Generator, Processor]]]


@dataclass(frozen=True)
class Settings(Config):
    """What a user chooses for a question.

    Attributes:
        max_new_tokens: The longest answer, in tokens.
        sampling: How the next token is chosen.
        variants: How each checkpoint is loaded.
        maps: Whether heat maps are computed after the answer.
        overview: Whether they show the overview of an image instead of the grid of its tiles.
    """

    max_new_tokens: PositiveInt
    sampling: Sampling
    variants: tuple[Variant, ...]
    maps: bool = True
    overview: bool = False


@dataclass(frozen=True)
class Upload:
    """An image that was checked.

    Attributes:
        name: The name of its file, as messages show it.
        data: The encoded image.
    """

    name: str
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class Stats:
    """The sizes and times of an answer.

    Attributes:
        prompt_tokens: The tokens of the prompt: the whole conversation, with vision tokens.
        vision_tokens: How many of these are vision tokens.
        tokens: The tokens of the answer so far.
        first_token: Seconds from the question to the first token, with the preparation of the images.
        rest: Seconds from the first token to the last one.
        compiled: Whether a program was compiled meanwhile, which the times include.
        finish: Why the answer ended, or None while it goes on.
    """

    prompt_tokens: int
    vision_tokens: int
    tokens: int
    first_token: float
    rest: float = 0.0
    compiled: bool = False
    finish: Literal["stop", "length"] | None = None

    @property
    def per_second(self) -> float | None:
        """The tokens per second after the first one, or None where there are too few to tell."""
        return (self.tokens - 1) / self.rest if self.tokens > 1 and self.rest > 0 else None

    def line(self) -> str:
        """The numbers as one line of text."""
        parts = [f"prompt {self.prompt_tokens:,} tokens, {self.vision_tokens:,} of them vision"]
        parts.append(f"first token after {self.first_token:.2f} s")
        speed = self.per_second
        parts.append(
            f"{self.tokens} token{'s' if self.tokens != 1 else ''}" + (f" at {speed:,.1f} tokens/s" if speed else "")
        )
        if self.finish == "length":
            parts.append("cut at the longest answer")
        if self.compiled:
            parts.append("times include compiling")
        return " \u00b7 ".join(parts)


@dataclass(frozen=True)
class Answer:
    """What is known of the answer of one model.

    Attributes:
        text: The text so far.
        stats: The numbers so far, or None before the first token.
        figures: The heat maps over the images of the conversation; None until they are computed.
        note: Why there are no heat maps, or what the model does now.
        problem: The one line that says why there is no answer, or nothing.
        whole: Whether the answer is complete and has joined the conversation.
        done: Whether nothing more will come.
    """

    text: str = ""
    stats: Stats | None = None
    figures: tuple[Figure, ...] | None = None
    note: str = ""
    problem: str = ""
    whole: bool = False
    done: bool = False


@dataclass(frozen=True)
class Example:
    """A question that the page offers.

    Attributes:
        question: The text of the question.
        image: The path of the image's file.
    """

    question: str
    image: str


@dataclass(frozen=True)
class Checkpoint:
    """What the page says of a checkpoint.

    Attributes:
        title: Its name.
        pruners: The pruners that a user may choose for it.
        pruner_note: One sentence about them, or why there are none.
    """

    title: str
    pruners: tuple[str, ...] = ()
    pruner_note: str = ""


@dataclass(frozen=True)
class PageOptions:
    """What the page shows beside answers.

    Attributes:
        checkpoints: The checkpoints.
        settings: What is chosen when the page opens.
        examples: The questions that the page offers.
    """

    checkpoints: tuple[Checkpoint, ...]
    settings: Settings
    examples: tuple[Example, ...] = ()

    @property
    def titles(self) -> tuple[str, ...]:
        """The name of each checkpoint."""
        return tuple(one.title for one in self.checkpoints)
