"""The requests of lmms-eval as generation settings and as items with their images."""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, override

from PIL import Image

from vr_jax.data.images import DECODE_ERRORS, decode_rgb
from vr_jax.data.skips import SkipRecord
from vr_jax.errors import UserError
from vr_jax.evaluation.interface import Benchmark, Item
from vr_jax.inference import Sampling

# The token limit for tasks that set none (e.g. TextVQA), which is that of most models of lmms-eval.
DEFAULT_NEW_TOKENS = 1024
# The largest limit of a task that is followed. The cache of a batch has room for all new tokens from the start, and
# some tasks ask for 49,152 of them.
MOST_NEW_TOKENS = 4096

_LIMITS = ("max_new_tokens", "max_gen_toks")
_KNOWN = frozenset({*_LIMITS, "temperature", "top_p", "do_sample", "until", "seed"})
# The settings that vr_jax does not have, with the values that change nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "top_k": (None, 0),
    "repetition_penalty": (None, 1),
    "use_cache": (None, True),
    # The LLaVA class of lmms-eval reads this only if the model's config has no image layout, and here it always has
    # one.
    "image_aspect_ratio": (None, "original", "pad", "anyres"),
}

# The errors that the code of a task can raise on a document. They cost one request, not the run.
_TASK_ERRORS: tuple[type[Exception], ...] = (*DECODE_ERRORS, AssertionError, AttributeError, ImportError)

logger = logging.getLogger("vr_jax.evaluation")


@dataclass(frozen=True)
class Settings:
    """The generation settings of a request. Requests with equal settings can share a batch.

    Attributes:
        max_new_tokens: The largest number of tokens of the reply.
        sampling: The sampling of the tokens.
        until: Strings before which the reply ends.
    """

    max_new_tokens: int
    sampling: Sampling
    until: tuple[str, ...] = ()

    def cut(self, reply: str) -> str:
        """Returns the reply up to the first of the strings `until`."""
        ends = [reply.find(stop) for stop in self.until]
        return reply[: min((end for end in ends if end >= 0), default=None)]


@dataclass(frozen=True)
class Question:
    """One request.

    Attributes:
        name: The task, the split and the number of the document, for messages.
        text: The prompt of the task.
        visuals: A function of the task that returns the images, or None or an empty list if there are none.
    """

    name: str
    text: str
    visuals: Callable[[], Any] = field(repr=False)


def settings_of(
    kwargs: Mapping[str, Any], *, max_new_tokens: int | None = None, seed: int = 0, cut_at_until: bool = False
) -> Settings:
    """Converts the `generation_kwargs` of a task.

    Decoding is greedy unless the temperature is above 0 and `do_sample` is not false.

    Args:
        kwargs: The settings of the task.
        max_new_tokens: A token limit that replaces the task's.
        seed: The seed of the random draws.
        cut_at_until: Whether the reply ends at the strings `until` of the task.

    Raises:
        UserError: A value is outside its range or has the wrong type.
    """
    limit = max_new_tokens
    if limit is None:
        asked = next((kwargs[name] for name in _LIMITS if kwargs.get(name) is not None), DEFAULT_NEW_TOKENS)
        limit = min(_count("max_new_tokens", asked), MOST_NEW_TOKENS)
    try:
        temperature = float(kwargs.get("temperature") or 0)
        top_p = kwargs.get("top_p")
        top_p = 1.0 if top_p is None else float(top_p)
        # A nucleus of probability 0 contains only the most probable token.
        greedy = temperature == 0 or top_p == 0 or kwargs.get("do_sample") is False
        sampling = Sampling() if greedy else Sampling(temperature, top_p, seed)
    except (TypeError, ValueError) as error:
        raise UserError(f"generation_kwargs {dict(kwargs)}: {error}") from error
    until = kwargs.get("until") or ()
    stops = (until,) if isinstance(until, str) else tuple(str(stop) for stop in until)
    return Settings(limit, sampling, tuple(stop for stop in stops if stop) if cut_at_until else ())


def without_effect(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a task that vr_jax cannot follow."""
    return {
        name: value
        for name, value in kwargs.items()
        if name not in _KNOWN and not (name in _NEUTRAL and value in _NEUTRAL[name])
    }


def capped(kwargs: Mapping[str, Any]) -> int | None:
    """Returns the token limit of a task if it is above MOST_NEW_TOKENS, or else None."""
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
    """Writes a PIL image as a PPM file, which keeps the RGB pixels and is fast, because it is not compressed.

    Raises:
        SkipRecord: The object is not an image (lmms-eval also passes videos and sounds), or it cannot be decoded.
    """
    buffer = io.BytesIO()
    decode_rgb(_image(image)).save(buffer, "PPM")
    return buffer.getvalue()


def header(image: Any) -> bytes:
    """Returns the header of the file that `encoded` writes, which holds the size, without decoding the image.

    Raises:
        SkipRecord: The object is not an image.
    """
    return b"P6\n%d %d\n255\n" % _image(image).size


def _image(image: Any) -> Image.Image:
    if not isinstance(image, Image.Image):
        raise SkipRecord("malformed_record", f"expected an image, found {type(image).__name__} (video or sound?)")
    return image


class QuestionItems(Sequence[Item]):
    """Questions as items of a benchmark.

    The images of an item are fetched when the item is accessed and are not kept, because those of a whole task can
    exceed the memory. Several threads may access items. The code of the tasks runs in one thread at a time, because it
    was not written for threads (some tasks load a second dataset on first use).
    """

    def __init__(self, questions: Sequence[Question], encode: Callable[[Any], bytes] = encoded):
        """Wraps questions.

        Args:
            questions: The questions.
            encode: The function that encodes an image: `encoded`, or `header` where only the sizes matter.
        """
        self.questions = questions
        self._encode = encode
        self._fetching = threading.Lock()

    def __len__(self) -> int:
        """Returns the number of questions."""
        return len(self.questions)

    def __getitem__(self, number: Any) -> Any:
        """Returns the item with a number. Slices are not supported."""
        question = self.questions[number]
        images: tuple[bytes, ...] = ()
        problem = None
        try:
            with self._fetching:
                visuals = question.visuals()
            images = tuple(self._encode(image) for image in _listed(visuals))
        except SkipRecord as error:
            problem = str(error)
        except _TASK_ERRORS as error:
            problem = f"malformed_record: doc_to_visual raised {type(error).__name__}: {error}"
        return Item(question.name, question.text, (), "", images, problem=problem)


def _listed(visuals: Any) -> list[Any]:
    """Returns images as a flat list. Tasks give None, one image, a list, or nested lists with gaps."""
    if visuals is None:
        return []
    if isinstance(visuals, list | tuple):
        return [image for one in visuals for image in _listed(one)]
    return [visuals]


class AsAsked(Benchmark):
    """Stands for the benchmark of an item, whose prompt lmms-eval has already written and whose reply it scores."""

    name = "lmms_eval"
    title = "lmms-eval"
    headline = ""
    has_placeholders = True  # lmms-eval's models replace `<image>` in the prompts of tasks.

    @override
    def prompt(self, item: Item) -> str:
        return item.question
