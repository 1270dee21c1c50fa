"""The chat template that a tokenizer brings along, as a chat format.

A template is a program that writes a whole conversation, so its parts are found by what it writes. Each text of the
messages is rendered once as it is, and once with a mark in its place. What stands between the marks is the template's,
and the conversation as it is must consist of the same pieces with the texts between them. So a text that reads as the
placeholder of an image, or as a part of the template, is never taken for one. Where a message ends follows
from the renderings of the first messages alone, each of which has to begin the next one.

The marks contain the character NUL, which no text of a message has (`vr_jax.data.texts.check_text`).
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NoReturn

from vr_jax.data.prompts.jinja import RENDER_ERRORS, render
from vr_jax.data.prompts.segments import LLAVA_SEPARATORS, ROLES, Kind, Role, Segment, without_empty
from vr_jax.data.skips import SkipRecord
from vr_jax.data.types import IMAGE, IMAGE_PLACEHOLDER, ImagePart, Marker, Part, Turn
from vr_jax.errors import UserError

_IMAGE_MARK = "\0image\0"
_ENDS: Mapping[Marker, str] = {Marker.IMAGE_START: "<|vision_start|>", Marker.IMAGE_END: "<|vision_end|>"}
# What templates write for an image, and the markers in it, which the image's layout writes. The first that fits counts.
_PLACEHOLDERS: tuple[tuple[str, Mapping[Marker, str]], ...] = (
    ("<|vision_start|><|image_pad|><|vision_end|>", _ENDS),
    (IMAGE_PLACEHOLDER, {}),
    ("<|image|>", {}),
    ("[IMG]", {}),
)
# A named template for the templates that cannot be used, by what they contain.
_NAMED = (
    ("<|vision_start|>", "qwen2_vl"),
    ("<|im_start|>", "qwen_1_5"),
    ("<|start_header_id|>", "llama_3"),
    ("[INST]", "mistral_instruct"),
    ("<用户>", "minicpm_v"),
    ("USER", "vicuna_v1"),
    ("ASSISTANT:", "vicuna_v1"),  # Templates may write the user's header from the role.
)
_PROBE = (Turn("user", "Pqa"), Turn("assistant", "Pqb"), Turn("user", "Pqc"), Turn("assistant", "Pqd"))


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a tokenizer (see `ChatFormat` for the attributes that are not listed). It can be pickled.

    Attributes:
        text: The template.
        values: What it may read beside the messages: the special tokens, and `enable_thinking = False`, with which
            templates of models that think ask for an answer without thoughts.
        special: The special tokens of the tokenizer, by which the end of a reply is found.
        placeholder: What the template writes for an image. Messages are then lists of parts. Where it is None, they are
            texts, in which a mark stands for an image.
        header: The assistant's header, with which a prompt ends.
    """

    text: str = field(repr=False)
    values: Mapping[str, Any] = field(repr=False)
    special: tuple[str, ...] = field(repr=False)
    placeholder: str | None = None
    header: str = ""
    markers: Mapping[Marker, str] = field(default_factory=dict)
    end_tokens: tuple[str, ...] = ()
    closes_replies: bool = True
    name: str = "tokenizer"
    bos: bool = True
    moves_images: bool = False
    quirk_tokens: tuple[str, ...] = ()
    single_tokens: tuple[str, ...] = ()

    @property
    def drops_newlines(self) -> bool:
        """A template that places images itself also writes what separates them from the text."""
        return self.placeholder is not None

    @property
    def separators(self) -> tuple[str, str]:
        """A template that is given texts does not separate images from them."""
        return LLAVA_SEPARATORS if self.placeholder is None else ("", "")

    @property
    def named(self) -> str:
        """The named template that comes nearest; ChatML where there is no sign of another one."""
        return next((name for part, name in _NAMED if part in self.text), "qwen_1_5")

    @classmethod
    def of(cls, tokenizer: Any) -> ChatTemplate:
        """Reads the chat template of a Hugging Face tokenizer, and finds out how it writes conversations.

        Raises:
            UserError: The tokenizer has no chat template, or one whose parts cannot be told apart.
        """
        try:
            text = str(tokenizer.get_chat_template())
        except (ValueError, AttributeError):
            raise UserError(
                "The tokenizer has no chat template, which the template 'tokenizer' needs; set the model's template to "
                f"one of {', '.join(repr(name) for _, name in _NAMED)}."
            ) from None
        tokens = {name: str(value) for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
        added = [str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values()]
        found = cls(
            text=text,
            values={**tokens, "enable_thinking": False},
            special=tuple(dict.fromkeys([*tokenizer.all_special_tokens, *added])),
        )
        found = found._with_placeholder(getattr(tokenizer, "image_token", None))
        header, closing = found.check()
        ends = (*closing, str(tokenizer.eos_token)) if tokenizer.eos_token else closing
        if not ends:
            raise UserError(
                "The tokenizer's chat template closes replies with no special token, and the tokenizer has no "
                f"eos_token; set one, or set the model's template to {found.named!r} instead of 'tokenizer'."
            )
        return replace(found, header=header, end_tokens=tuple(dict.fromkeys(ends)), closes_replies=bool(closing))

    def write(self, turns: Sequence[Turn], *, prompt: bool) -> list[Segment]:
        """Writes a conversation; see `ChatFormat.write`."""
        texts = {(k, i): text for k, turn in enumerate(turns) for i, text in enumerate(_texts(turn))}
        try:
            whole = self._render([self._message(turn, _texts(turn)) for turn in turns], prompt)
            marked = [
                self._message(turn, (_mark(k, i) for i in range(len(turn.parts) + 1))) for k, turn in enumerate(turns)
            ]
            skeleton = self._render(marked, prompt)
        except RENDER_ERRORS as error:
            self._refuse(f"refuses the roles {[turn.role for turn in turns]} ({_first_line(error)})", error)
        literals, keys = _split(skeleton)
        if sorted(keys) != sorted(texts) or keys != sorted(keys):
            self._refuse("does not write every text of the messages once, in their order")
        ends = self._message_ends(marked, skeleton, turns)
        contents = self._aligned(whole, literals, [texts[key] for key in keys])
        segments, place = [], 0
        for number, literal in enumerate(literals):
            if number > 0:
                k, i = keys[number - 1]
                segments.append(Segment(contents[number - 1], ROLES[turns[k].role], k, Kind.CONTENT))
                place += len(_mark(k, i))
            # What follows the last text of a reply closes it.
            last = number > 0 and (number == len(keys) or keys[number][0] != keys[number - 1][0])
            closes = keys[number - 1][0] if last and turns[keys[number - 1][0]].role == "assistant" else None
            segments += self._literal(literal, place, ends, turns, closes)
            place += len(literal)
        return without_empty(segments)

    def check(self) -> tuple[str, tuple[str, ...]]:
        """Checks that the template's parts can be told apart.

        Returns:
            The assistant's header, and the tokens that end a reply.

        Raises:
            UserError: They cannot.
        """
        try:
            once, _ = self.write(_PROBE[:2], prompt=False), self.write(_PROBE, prompt=False)
            asked, _ = self.write(_PROBE[:1], prompt=True), self.write(_PROBE[:3], prompt=True)
            if not _text_of(once).startswith(_text_of(asked)):
                self._refuse("does not begin a reply with what it ends a prompt with")
            header = "".join(str(segment.part) for segment in asked if segment.role == Role.ASSISTANT)
            once = replace(self, header=header).write(_PROBE[:2], prompt=False)
        except SkipRecord as error:
            raise UserError(error.detail) from error
        ends = [segment.part for segment in once if segment.kind == Kind.REPLY]
        return header, tuple(token for token in self.special if any(str(end).endswith(token) for end in ends))

    def _literal(
        self, literal: str, place: int, ends: Sequence[int], turns: Sequence[Turn], closes: int | None
    ) -> Iterator[Segment]:
        """Yields the pieces of the template's own text and the images in it.

        Args:
            literal: The text.
            place: Where it stands in the skeleton.
            ends: Where each message ends there.
            turns: The messages.
            closes: The reply that the text closes, or None.
        """
        cuts = [end - place for end in ends if 0 < end - place < len(literal)]
        for start, stop in pairwise([0, *cuts, len(literal)]):
            k = bisect.bisect_right(ends, place + start)
            role = ROLES[turns[k].role] if k < len(turns) else Role.ASSISTANT
            text = literal[start:stop]
            begins = role == Role.ASSISTANT and k < len(turns) and place + start == (ends[k - 1] if k else 0)
            if begins and self.header and text.startswith(self.header):
                yield Segment(self.header, role, k)
                yield Segment(text.removeprefix(self.header), role, k, Kind.REPLY)
                continue
            if start == 0 and closes is not None and k == closes:
                end = self._end_of_reply(text)
                yield Segment(text[:end], role, k, Kind.REPLY)
                text = text[end:]
            pieces = text.split(self.placeholder or _IMAGE_MARK)
            for number, piece in enumerate(pieces):
                if number > 0:
                    yield Segment(IMAGE, role, k, Kind.CONTENT)
                yield Segment(piece, role, k)

    def _end_of_reply(self, text: str) -> int:
        """Returns where the first special token of a text ends, or 0 without one."""
        found = [(text.index(token), -len(token)) for token in self.special if token and token in text]
        return min(found)[0] - min(found)[1] if found else 0

    def _aligned(self, whole: str, literals: Sequence[str], texts: Sequence[str]) -> list[str]:
        """Returns the texts as the template writes them: as they are, or without white space around them."""
        if not whole.startswith(literals[0]):
            self._refuse("writes other text around these messages than around others")
        found, at = [], len(literals[0])
        for number, text in enumerate(texts):
            literal = literals[number + 1]
            for candidate in (text, text.strip(), text.lstrip(), text.rstrip()):
                end = at + len(candidate)
                last = number + 1 == len(texts)
                if whole.startswith(candidate + literal, at) and (not last or end + len(literal) == len(whole)):
                    break
            else:
                self._refuse("changes a text, e.g. because it removes thoughts from earlier replies")
            found.append(candidate)
            at = end + len(literal)
        return found

    def _message_ends(self, messages: Sequence[dict[str, Any]], skeleton: str, turns: Sequence[Turn]) -> list[int]:
        """Returns where each message ends, which is where the rendering of the first messages alone ends."""
        ends: list[int] = []
        for k in range(1, len(messages) + 1):
            try:
                first: str | None = self._render(messages[:k], False)
            except RENDER_ERRORS:
                first = None
            if first is not None and skeleton.startswith(first) and len(first) >= (ends[-1] if ends else 0):
                ends.append(len(first))
            elif k == 1 and turns[0].role == "system":  # Templates may write it with the next message only.
                ends.append(0)
            else:
                self._refuse(
                    f"writes the first {k} of {len(messages)} messages differently where more follow, so that the "
                    "messages cannot be told apart"
                )
        return ends

    def _with_placeholder(self, own: Any) -> ChatTemplate:
        """Finds out whether messages can be given in parts, and what the template then writes for an image."""
        ask, text = Turn("user", _PROBE[0].text), {"type": "text", "text": _PROBE[0].text}
        as_text = self._rendered_or_none({"role": "user", "content": ask.text})
        as_parts = self._rendered_or_none({"role": "user", "content": [text]})
        if as_text is not None and ask.text not in as_text:
            as_text = None
        if as_parts is not None and as_parts.count(ask.text) == 1 and as_text in (None, as_parts):
            with_image = self._rendered_or_none({"role": "user", "content": [{"type": "image"}, text]}) or ""
            for placeholder, markers in (*_PLACEHOLDERS, *([(own, {})] if isinstance(own, str) else [])):
                if with_image.count(placeholder) == as_parts.count(placeholder) + 1:
                    return replace(self, placeholder=placeholder, markers=markers)
        return self

    def _rendered_or_none(self, message: dict[str, Any]) -> str | None:
        try:
            return self._render([message], False)
        except RENDER_ERRORS:
            return None

    def _render(self, messages: Sequence[dict[str, Any]], prompt: bool) -> str:
        return render(self.text, messages, self.values, prompt=prompt)

    def _message(self, turn: Turn, texts: Iterable[str]) -> dict[str, Any]:
        """Returns a message as the template reads it, with other texts in the places of its own ones."""
        given = iter(texts)
        parts: list[Part] = [part if isinstance(part, ImagePart) else next(given) for part in turn.parts or ("",)]
        if self.placeholder is None:
            content: Any = "".join(_IMAGE_MARK if isinstance(part, ImagePart) else part for part in parts)
        else:
            content = [
                {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part} for part in parts
            ]
        return {"role": turn.role, "content": content}

    def _refuse(self, what: str, cause: Exception | None = None) -> NoReturn:
        raise SkipRecord(
            "wrong_template",
            f"The tokenizer's chat template {what}; set the model's template to {self.named!r} instead of 'tokenizer'.",
        ) from cause


def _texts(turn: Turn) -> list[str]:
    """Returns the texts of a message; an empty message has an empty one."""
    return [part for part in turn.parts or ("",) if not isinstance(part, ImagePart)]


def _mark(k: int, i: int) -> str:
    """Stands for a text of a message in the skeleton."""
    return f"\0{k}.{i}\0"


def _split(skeleton: str) -> tuple[list[str], list[tuple[int, int]]]:
    """Returns the template's own text around the marks, and the messages and texts that the marks stand for."""
    pieces = re.split(r"\0(\d+)\.(\d+)\0", skeleton)
    return pieces[::3], [(int(k), int(i)) for k, i in zip(pieces[1::3], pieces[2::3], strict=True)]


def _text_of(segments: Iterable[Segment]) -> str:
    return "".join(IMAGE_PLACEHOLDER if isinstance(one.part, ImagePart) else one.part for one in segments)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
