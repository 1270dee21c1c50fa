"""What lmms-eval asks, in vr_jax's words: generation settings, and items with their images."""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from vr_jax.data.images import decode_rgb
from vr_jax.data.skips import SkipRecord
from vr_jax.errors import UserError
from vr_jax.evaluation.interface import Benchmark, Item
from vr_jax.inference import Sampling

DEFAULT_NEW_TOKENS = 1024  # of tasks without a limit, as most models of lmms-eval (benchmarks like TextVQA)
# The cache of a batch has room for all new tokens from the start, and some tasks ask for 49,152 of them.
MOST_NEW_TOKENS = 4096

_LIMITS = ("max_new_tokens", "max_gen_toks")
_KNOWN = frozenset({*_LIMITS, "temperature", "top_p", "do_sample", "until", "seed"})
# Settings that vr_jax does not have, with the values that change nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "top_k": (None, 0),
    "repetition_penalty": (None, 1),
    "use_cache": (None, True),
    # lmms-eval's LLaVA heeds it only for a model whose configuration has no image layout; ours always has.
    "image_aspect_ratio": (None, "original", "pad", "anyres"),
}

logger = logging.getLogger("vr_jax.evaluation")


@dataclass(frozen=True)
class Settings:
    """How a reply is generated; requests with equal ones can share a batch."""

    max_new_tokens: int
    sampling: Sampling
    until: tuple[str, ...] = ()  # the reply ends before the first of these

    def cut(self, reply: str) -> str:
        ends = [reply.find(stop) for stop in self.until]
        return reply[: min((end for end in ends if end >= 0), default=None)]


@dataclass(frozen=True)
class Question:
    """One request. `visuals` fetches its images, None or an empty list if it has none; the task's own code may do
    anything there."""

    name: str  # for messages: task, split and number of the document
    text: str
    visuals: Callable[[], Any] = field(repr=False)


def settings_of(
    kwargs: Mapping[str, Any], *, max_new_tokens: int | None = None, seed: int = 0, cut_at_until: bool = False
) -> Settings:
    """A task's `generation_kwargs`. Greedy unless there is a temperature above 0 and `do_sample` is not false.

    max_new_tokens: in place of the task's. cut_at_until: also heed `until` (lmms-eval's own models do not).
    Raises UserError for a value that makes no sense."""
    limit = max_new_tokens
    if limit is None:
        asked = next((kwargs[name] for name in _LIMITS if kwargs.get(name) is not None), DEFAULT_NEW_TOKENS)
        limit = min(_count("max_new_tokens", asked), MOST_NEW_TOKENS)
    try:
        temperature = float(kwargs.get("temperature") or 0)
        top_p = kwargs.get("top_p")
        top_p = 1.0 if top_p is None else float(top_p)
        # A nucleus of no probability holds the most probable token.
        greedy = temperature == 0 or top_p == 0 or kwargs.get("do_sample") is False
        sampling = Sampling() if greedy else Sampling(temperature, top_p, seed)
    except (TypeError, ValueError) as error:
        raise UserError(f"generation_kwargs {dict(kwargs)}: {error}") from error
    until = kwargs.get("until") or ()
    stops = (until,) if isinstance(until, str) else tuple(str(stop) for stop in until)
    return Settings(limit, sampling, tuple(stop for stop in stops if stop) if cut_at_until else ())


def without_effect(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in `kwargs` that vr_jax cannot follow."""
    return {
        name: value
        for name, value in kwargs.items()
        if name not in _KNOWN and not (name in _NEUTRAL and value in _NEUTRAL[name])
    }


def capped(kwargs: Mapping[str, Any]) -> int | None:
    """The task's limit on new tokens if it is above MOST_NEW_TOKENS."""
    asked = max((int(kwargs[name]) for name in _LIMITS if kwargs.get(name) is not None), default=0)
    return asked if asked > MOST_NEW_TOKENS else None


def _count(name: str, value: Any) -> int:
    try:
        count = int(value)
    except (TypeError, ValueError):
        count = 0
    if count < 1 or count != float(value):
        raise UserError(f"{name} = {value!r}: expected a whole number of at least 1")
    return count


def encoded(image: Any) -> bytes:
    """A PIL image as the file that the processor reads: its RGB pixels unchanged, and quickly (PPM compresses nothing).

    Raises SkipRecord for what is no image (lmms-eval also hands out videos and sounds), or does not decode."""
    buffer = io.BytesIO()
    decode_rgb(_image(image)).save(buffer, "PPM")
    return buffer.getvalue()


def header(image: Any) -> bytes:
    """The beginning of that file, which tells the size; nothing is decoded. Raises SkipRecord for what is no
    image."""
    return b"P6\n%d %d\n255\n" % _image(image).size


def _image(image: Any) -> Image.Image:
    if not isinstance(image, Image.Image):
        raise SkipRecord("malformed_record", f"expected an image, found {type(image).__name__} (video or sound?)")
    return image


class QuestionItems(Sequence[Item]):
    """The questions as items of a benchmark. Images are fetched when an item is asked for, and not kept: those of a
    whole task may exceed the memory.

    Threads may ask at the same time; the tasks' code runs in one at a time, because it was not written for threads
    (some tasks load a second dataset on first use).

    encode: `header` where only the images' sizes matter."""

    def __init__(self, questions: Sequence[Question], encode: Callable[[Any], bytes] = encoded):
        self.questions = questions
        self._encode = encode
        self._fetching = threading.Lock()

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, number: Any) -> Any:  # only by number
        question = self.questions[number]
        images: tuple[bytes, ...] = ()
        problem = None
        try:
            with self._fetching:
                visuals = question.visuals()
            images = tuple(self._encode(image) for image in _listed(visuals))
        except SkipRecord as error:
            problem = str(error)
        except Exception as error:  # whatever a task's code may raise: one request must not end the run
            problem = f"malformed_record: doc_to_visual raised {type(error).__name__}: {error}"
        return Item(question.name, question.text, (), "", images, problem=problem)


def _listed(visuals: Any) -> list[Any]:
    """Images as a flat list: tasks give None, one image, a list, or lists with gaps."""
    if visuals is None:
        return []
    if isinstance(visuals, list | tuple):
        return [image for one in visuals for image in _listed(one)]
    return [visuals]


class AsAsked(Benchmark):
    """Lets `plan` ask items as they are: lmms-eval has written the prompt, and scores."""

    name = "lmms_eval"
    title = "lmms-eval"
    headline = ""

    def prompt(self, item: Item) -> str:
        return item.question
