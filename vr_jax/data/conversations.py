"""Conversion of turns to token ids, with the masks that the loss and the text-guided token need.

A chat format (`vr_jax.data.prompts`) writes a conversation as segments: its own text, the parts of the messages, and
what closes a message. `ChatEncoder` tokenises the text as a whole, and finds the segments of each token by its
characters. Token ids and targets of LLaVA's formats are those of LLaVA-NeXT (llava/train/train.py), which recorded
outputs of the official code check in tests/golden. `docs/design/methods.md#labels` describes them, and
`docs/design/methods.md#text-guided-token` describes the mask of the text-guided token.

The speaker of every token is stored in `roles` and `turns`. It is never derived from the targets of the loss, because
these may also contain tokens of the user.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import tokenizers
from jaxtyping import Bool, Int

from vr_jax.data.prompts.chat_templates import ChatTemplate
from vr_jax.data.prompts.segments import ROLES, ChatFormat, Kind, Role, Segment
from vr_jax.data.prompts.templates import NAMED, Plain
from vr_jax.data.skips import SkipRecord
from vr_jax.data.texts import check_text
from vr_jax.data.types import IMAGE, IMAGE_PLACEHOLDER, ImagePart, Marker, Turn
from vr_jax.errors import UserError
from vr_jax.fields import check_value
from vr_jax.model.config import Template

# This id stands for a whole image until its vision tokens replace it (LLaVA's IMAGE_TOKEN_INDEX).
IMAGE_TOKEN = -200
# LLaVA removes this marker of the data set VideoInstruct-100k from every message.
VIDEO_MARKER = "QA_GT_caption_based_noisy"
# Stands for an image in the text that is tokenised. No text of a message has the character NUL.
_IMAGE_MARK = f"\0{IMAGE_PLACEHOLDER}\0"

TextPool = Literal["none", "first_turn", "all_human", "all"]


@dataclass(frozen=True)
class TokenisedConversation:
    """The n tokens of one sample. Each image is still one IMAGE_TOKEN, which is in neither mask.

    Attributes:
        tokens: Token ids.
        loss_mask: True where the token is a target of the loss.
        text_token_mask: True where the text-guided token may pool the token.
        roles: The `Role` of the message that a token belongs to.
        turns: The index of that message, or -1 for the default system message.
    """

    tokens: Int[np.ndarray, " n"]
    loss_mask: Bool[np.ndarray, " n"]
    text_token_mask: Bool[np.ndarray, " n"]
    roles: Int[np.ndarray, " n"]
    turns: Int[np.ndarray, " n"]


def move_images(turns: Sequence[Turn]) -> list[Turn]:
    """Moves the only image of a message to its front; several images of a message stay in place.

    Source: LLaVA-NeXT: llava/train/train.py, `preprocess_multimodal`.
    """
    moved = []
    for turn in turns:
        parts = turn.parts
        if turn.images == 1 and parts[0] is not IMAGE:
            rest = "".join(part for part in parts if not isinstance(part, ImagePart)).strip()
            parts = (IMAGE, f"\n{rest}") if rest else (IMAGE,)
        kept = [part if isinstance(part, ImagePart) else part.replace(VIDEO_MARKER, "") for part in parts]
        moved.append(Turn(turn.role, *kept))
    return moved


def drop_newlines(turns: Sequence[Turn]) -> list[Turn]:
    """Drops the newline behind an image, which LLaVA's records have, and other formats write themselves or not at all.

    A newline that follows the dropped one stays.
    """
    kept = []
    for turn in turns:
        parts = list(turn.parts)
        for k in range(1, len(parts)):
            part = parts[k]
            if not isinstance(part, ImagePart) and isinstance(parts[k - 1], ImagePart):
                parts[k] = part.removeprefix("\n")
        kept.append(Turn(turn.role, *parts))
    return kept


@functools.lru_cache(maxsize=4)
def _with_image_token(state: str) -> tuple[tokenizers.Tokenizer, int]:
    """Returns a tokenizer with a token for images whose name no text has, and the id of that token.

    As in the processors of transformers, a special token stands for an image, so that the text beside it is tokenised
    as transformers does. `<image>` is text, also where it is a token, as in the tokenizers of LLaVA-OneVision: it gives
    its id to the new name, because the ids of added tokens follow from their order. Other special tokens in a text are
    encoded as such, as LLaVA and transformers do.
    """
    values = json.loads(state)
    values["truncation"] = values["padding"] = None  # Another user of the same tokenizer may have switched these on.
    for token in values["added_tokens"]:
        if token["content"] == IMAGE_PLACEHOLDER:
            token.update(content=_IMAGE_MARK, normalized=False)
    found = tokenizers.Tokenizer.from_str(json.dumps(values))
    found.add_special_tokens([tokenizers.AddedToken(_IMAGE_MARK, special=True, normalized=False)])
    number = found.token_to_id(_IMAGE_MARK)
    assert number is not None
    return found, number


def chat_format(template: Template, tokenizer: Any) -> ChatFormat:
    """Returns a chat format by its name.

    Args:
        template: The name.
        tokenizer: The Hugging Face tokenizer, whose own template "tokenizer" is.

    Raises:
        UserError: The tokenizer has no usable template.
    """
    return ChatTemplate.of(tokenizer) if template == "tokenizer" else NAMED[template]


class ChatEncoder:
    """Turns conversations into token ids and masks.

    It keeps only the Rust part of the Hugging Face tokenizer, so that worker processes need neither transformers nor
    the torch that transformers imports.

    Attributes:
        template: The name of the format: one of `VlmConfig.template`, or "plain" (captions).
        format: The format.
        label_quirk: Whether the targets are those of LLaVA's code, where that has a quirk for the format: whole
            assistant messages with their header, and the tokens `format.quirk_tokens` of any message. Otherwise they
            are the assistant's messages and what closes each of them.
        text_pool: The text that `text_token_mask` marks, as in `VisionRememberConfig.text_pool`.
        pad_id: The id of the pad token.
        markers: The ids of the markers that stand beside the vision tokens of an image.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: Template | Literal["plain"],
        label_quirk: bool,
        text_pool: TextPool,
        *,
        markers_of: Template = "qwen_1_5",
    ):
        """Checks that the tokenizer can write the template.

        Args:
            tokenizer: A Hugging Face fast tokenizer.
            template: See the attribute.
            label_quirk: See the attribute.
            text_pool: See the attribute.
            markers_of: The model's chat format, whose markers "plain" has.

        Raises:
            UserError: The tokenizer is not a fast one, has no pad token, or lacks a token that the template needs, or
                its own template is to be used and cannot be.
            ConfigError: The template is unknown.
        """
        check_value(Template | Literal["plain"], template, "template")
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"The tokenizer {type(tokenizer).__name__} is not a fast tokenizer, so it cannot tell character "
                "positions; use a directory with a tokenizer.json."
            )
        if tokenizer.pad_token_id is None:
            raise UserError("The tokenizer has no pad token; set one (Qwen2 uses '<|endoftext|>').")
        self.template = template
        self.label_quirk = label_quirk
        self.text_pool = text_pool
        self.pad_id: int = tokenizer.pad_token_id
        chat = chat_format(markers_of if template == "plain" else template, tokenizer)
        self.format: ChatFormat = Plain(chat.markers) if template == "plain" else chat
        backend = tokenizer.backend_tokenizer
        self._tokenizer, self._image_id = _with_image_token(backend.to_str())
        self._bos_ids = _front(tokenizer, self._tokenizer) if self.format.bos else []
        names = dict.fromkeys((*self.format.single_tokens, *self.format.quirk_tokens))
        single = {name: self._single_id(name, backend) for name in names}
        self._quirk_ids = [single[name] for name in self.format.quirk_tokens]
        self.markers: dict[Marker, int] = {
            marker: self._single_id(name, backend) for marker, name in self.format.markers.items()
        }
        special = [number for name, number in single.items() if name.strip()]
        self._special_ids = np.asarray([IMAGE_TOKEN, *tokenizer.all_special_ids, *special])

    @property
    def separators(self) -> tuple[str, str]:
        """What stands between images, and behind the last one, where a question gives them no places."""
        return self.format.separators

    def _single_id(self, text: str, backend: tokenizers.Tokenizer) -> int:
        """Returns the id of a text that has to be one token.

        A vocabulary may hold an ordinary token, such as Qwen2's "</s>", that no text becomes. It cannot be what the
        format writes, since a model would then learn to end its replies with other tokens than the one that ends them.
        """
        known, ids = backend.token_to_id(text), self._ids(text)
        if known is not None and (known in ids or text not in self.format.single_tokens):
            return known
        if len(ids) != 1:
            raise UserError(
                f"The tokenizer encodes {text!r} as {len(ids)} tokens {ids}, but the template {self.format.name!r} "
                "needs one token; use the tokenizer of the chat model, or set the model's template to the format that "
                "it speaks."
            )
        return ids[0]

    def sample(self, turns: Sequence[Turn]) -> TokenisedConversation:
        """Encodes a training sample.

        Args:
            turns: The messages.

        Raises:
            SkipRecord: A message has an unknown role or a wrong type, there is no message of the user or of the
                assistant, or the template does not fit.
        """
        turns = _checked(turns)
        if self.format.moves_images and any(turn.images for turn in turns):
            turns = move_images(turns)
        if self.format.drops_newlines:
            turns = drop_newlines(turns)
        if self.template != "plain":
            turns = _without_leading_answer(turns)
            if not any(turn.role == "assistant" for turn in turns):
                raise SkipRecord("no_answer", "No message of the assistant follows a message of the user.")
        return self._encode(turns, prompt=False)

    def prompt(self, turns: Sequence[Turn]) -> TokenisedConversation:
        """Encodes a question to the model. The result ends with the assistant's header and has no targets.

        A final message of the assistant, which would be the reference answer, is left out. Images stay where they are.

        Args:
            turns: The messages.

        Raises:
            SkipRecord: As in `sample`.
        """
        turns = _checked(turns)
        while turns and turns[-1].role == "assistant":
            turns.pop()
        if self.template != "plain":
            turns = _without_leading_answer(turns)
        return self._encode(turns, prompt=True)

    def reply(self, text: str) -> tuple[list[int], int]:
        """Encodes a given reply, as it would follow a prompt.

        Returns:
            Its tokens with what closes it, and how many of them stand behind the token that ends the reply.
        """
        question, answer = Turn("user", "?"), Turn("assistant", text)
        whole = self._encode([question, answer], prompt=False).tokens
        asked = self._encode([question], prompt=True).tokens
        segments = self.format.write([question, answer], prompt=False)
        if np.array_equal(whole[: len(asked)], asked):
            ids = whole[len(asked) :].tolist()
        else:  # One token holds the end of the prompt and the beginning of the reply.
            header = self.format.write([question], prompt=True)
            written = "".join(str(one.part) for one in segments)
            ids = self._ids(written.removeprefix("".join(str(one.part) for one in header)))
        last = segments[-1]
        return ids, len(self._ids(str(last.part))) if last.kind == Kind.TEMPLATE else 0

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _encode(self, turns: Sequence[Turn], *, prompt: bool) -> TokenisedConversation:
        """Writes and tokenises a conversation."""
        segments = self.format.write(turns, prompt=prompt)
        text = "".join(_IMAGE_MARK if isinstance(one.part, ImagePart) else one.part for one in segments)
        encoded = self._tokenizer.encode(text, add_special_tokens=False)
        ids = np.asarray(encoded.ids, np.int32)
        ids = np.where(ids == self._image_id, np.int32(IMAGE_TOKEN), ids)
        spans = _Spans(encoded.offsets, segments)
        loss = np.zeros(len(ids), bool)
        if not prompt and self.label_quirk and self._quirk_ids:
            loss = (spans.roles == Role.ASSISTANT) | np.isin(ids, self._quirk_ids)
        elif not prompt:
            loss = spans.overlap(spans.answers)
        pooled = spans.overlap(spans.questions(self._pooled_turns(turns))) & ~np.isin(ids, self._special_ids)
        front = [] if list(ids[: len(self._bos_ids)]) == self._bos_ids else self._bos_ids
        return TokenisedConversation(
            tokens=_behind(front, ids),
            loss_mask=_behind([False] * len(front), loss & (ids != IMAGE_TOKEN)),
            text_token_mask=_behind([False] * len(front), pooled),
            roles=_behind([Role.SYSTEM] * len(front), spans.roles),
            turns=_behind([-1] * len(front), spans.turns),
        )

    def _pooled_turns(self, turns: Sequence[Turn]) -> set[int]:
        """Returns the messages whose text the text-guided token may pool."""
        asked = [k for k, turn in enumerate(turns) if turn.role == "user"]
        if self.template == "plain":  # The question is not written.
            return {1} if self.text_pool == "all" else set()
        said = [k for k, turn in enumerate(turns) if turn.role != "system"]
        return set({"none": [], "first_turn": asked[:1], "all_human": asked, "all": said}[self.text_pool])


def _front(tokenizer: Any, backend: tokenizers.Tokenizer) -> list[int]:
    """Returns the token that the tokenizer puts in front of every text, as a list that may be empty."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and backend.encode("").ids[:1] == [bos] else []


def _behind(front: Sequence[Any], array: np.ndarray) -> np.ndarray:
    return np.concatenate([np.asarray(front, array.dtype), array])


class _Spans:
    """The characters of tokens and of segments.

    Attributes:
        roles: The role of each token, which is that of its last character.
        turns: The index of the message of each token.
        answers: The half-open spans of the assistant's messages, and of what the format has a model write beside them.
    """

    def __init__(self, offsets: Sequence[tuple[int, int]], segments: Sequence[Segment]):
        self._start, self._end = np.asarray(offsets, np.int64).reshape(-1, 2).T
        sizes = [len(_IMAGE_MARK) if isinstance(one.part, ImagePart) else len(one.part) for one in segments]
        bounds = np.cumsum([0, *sizes])
        self._spans = list(zip(segments, bounds[:-1].tolist(), bounds[1:].tolist(), strict=True))
        last = np.searchsorted(bounds, np.maximum(self._end - 1, self._start), "right") - 1
        last = np.minimum(last, len(segments) - 1)
        self.roles = np.asarray([one.role for one in segments], np.int8)[last]
        self.turns = np.asarray([one.turn for one in segments], np.int32)[last]
        written = [one for one in self._spans if one[0].role == Role.ASSISTANT and one[0].kind != Kind.TEMPLATE]
        self.answers = [(begin, end) for _, begin, end in written]

    def questions(self, turns: set[int]) -> list[tuple[int, int]]:
        """Returns the spans of the texts of some messages that the text-guided token may pool.

        In a message with images these are the texts behind the first one, without the white space that follows an
        image.
        """
        with_image = {one.turn for one, _, _ in self._spans if isinstance(one.part, ImagePart)}
        seen, found = set(), []
        follows = False  # Whether an image is the last part of the message so far.
        for one, begin, end in self._spans:
            if one.kind != Kind.CONTENT or one.turn not in turns:
                continue
            if isinstance(one.part, ImagePart):
                seen.add(one.turn)
                follows = True
            elif one.turn in seen or one.turn not in with_image:
                spaces = len(one.part) - len(one.part.lstrip()) if follows and one.turn in seen else 0
                found.append((begin + spaces, end))
                follows = False
        return [(begin, end) for begin, end in found if begin < end]

    def overlap(self, spans: Sequence[tuple[int, int]]) -> Bool[np.ndarray, " n"]:
        """Marks the tokens that hold any character of the spans, which are sorted and disjoint."""
        if not spans:
            return np.zeros(len(self._start), bool)
        begins, ends = np.asarray(spans).T
        first = np.searchsorted(ends, self._start, "right")
        inside = first < len(ends)
        begin = begins[np.minimum(first, len(ends) - 1)]
        return inside & ((begin < self._end) | (begin <= self._start))


def _checked(turns: Sequence[Turn]) -> list[Turn]:
    """Returns the turns as a list, after checking roles and texts."""
    if not turns:
        raise SkipRecord("empty_conversation", "The conversation has no turns.")
    for k, turn in enumerate(turns):
        if turn.role not in ROLES:
            known = ", ".join(map(repr, ROLES))
            raise SkipRecord("unknown_role", f"Turn {k} has the role {turn.role!r}, but it must be one of {known}.")
        for part in turn.parts:
            if not isinstance(part, ImagePart):
                check_text(part, f"The text of turn {k}")
    return list(turns)


def _without_leading_answer(turns: list[Turn]) -> list[Turn]:
    """Drops a first message of the assistant, as LLaVA does. A system message before it stays."""
    system = turns[:1] if turns and turns[0].role == "system" else []
    rest = turns[len(system) :]
    if rest and rest[0].role == "assistant":
        rest = rest[1:]
    if not rest:
        raise SkipRecord("empty_conversation", "The conversation has no message of the user.")
    return system + rest
