"""Conversion of turns to token ids, with the masks that the loss and the text-guided token need.

There are two templates: `qwen_1_5` (ChatML) and `plain` (captions). Token ids and targets are those of LLaVA-NeXT's
`preprocess_multimodal`, `preprocess_qwen` and `preprocess_plain` (LLaVA-NeXT: llava/train/train.py), which recorded
outputs of the official code check in tests/golden. `docs/design/methods.md#labels` describes them, and
`docs/design/methods.md#text-guided-token` describes the mask of the text-guided token.

The speaker of every token is stored in `roles` and `turns`. It is never derived from the targets of the loss, because
these also contain tokens of the user.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import tokenizers
from jaxtyping import Bool, Int

from vr_jax.data.skips import SkipRecord
from vr_jax.data.texts import check_text
from vr_jax.data.types import IMAGE, IMAGE_PLACEHOLDER, ImagePart, Marker, Part, Turn
from vr_jax.errors import UserError
from vr_jax.fields import check_value

# This id stands for a whole image until its vision tokens replace it (LLaVA's IMAGE_TOKEN_INDEX).
IMAGE_TOKEN = -200
SYSTEM_MESSAGE = "You are a helpful assistant."
# LLaVA removes this marker of the data set VideoInstruct-100k from every message.
VIDEO_MARKER = "QA_GT_caption_based_noisy"

Template = Literal["qwen_1_5", "plain"]
TextPool = Literal["none", "first_turn", "all_human", "all"]


class Role(enum.IntEnum):
    """The speaker of a token, as a number that fits into an array."""

    SYSTEM = 0
    USER = 1
    ASSISTANT = 2


ROLES = {"system": Role.SYSTEM, "user": Role.USER, "assistant": Role.ASSISTANT}


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


def _without_placeholder(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Returns a tokenizer to which `<image>` is text, also where it is a token, as in those of LLaVA-OneVision.

    Other special tokens in a text are encoded as such, as LLaVA and transformers do.
    """
    if tokenizer.token_to_id(IMAGE_PLACEHOLDER) is None:
        return tokenizer
    state = json.loads(tokenizer.to_str())
    for token in state["added_tokens"]:
        if token["content"] == IMAGE_PLACEHOLDER:
            # The ids of added tokens follow from their order, so the token is renamed. No text contains the new name.
            token["content"] = f"\0{IMAGE_PLACEHOLDER}\0"
    return tokenizers.Tokenizer.from_str(json.dumps(state))


class ChatEncoder:
    """Turns conversations into token ids and masks.

    It keeps only the Rust part of the Hugging Face tokenizer, so that worker processes need neither transformers nor
    the torch that transformers imports.

    Attributes:
        tokenizer: The Rust tokenizer.
        template: The format of the text: "qwen_1_5" (ChatML) or "plain" (captions).
        label_quirk: Whether the targets are those of LLaVA's code: whole assistant messages with their header, and
            every newline, <|im_start|> and <|im_end|> token of any message. Otherwise they are the answers and the
            <|im_end|> that closes each of them.
        text_pool: The text that `text_token_mask` marks, as in `VisionRememberConfig.text_pool`.
        pad_id: The id of the pad token.
        markers: The ids of the markers that stand beside the vision tokens of an image.
    """

    def __init__(self, tokenizer: Any, template: Template, label_quirk: bool, text_pool: TextPool):
        """Checks that the tokenizer can write the template.

        Args:
            tokenizer: A Hugging Face fast tokenizer.
            template: See the attribute.
            label_quirk: See the attribute.
            text_pool: See the attribute.

        Raises:
            UserError: The tokenizer is not a fast one, has no pad token, or lacks a token that the template needs.
            ConfigError: The template is unknown.
        """
        check_value(Template, template, "template")
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"The tokenizer {type(tokenizer).__name__} is not a fast tokenizer, so it cannot tell character "
                "positions; use a directory with a tokenizer.json."
            )
        if tokenizer.pad_token_id is None:
            raise UserError("The tokenizer has no pad token; set one (Qwen2 uses '<|endoftext|>').")
        self.tokenizer: tokenizers.Tokenizer = _without_placeholder(tokenizer.backend_tokenizer)
        self.template = template
        self.label_quirk = label_quirk
        self.text_pool = text_pool
        self.pad_id: int = tokenizer.pad_token_id
        self.markers: dict[Marker, int] = {}
        self._special_ids = np.asarray([IMAGE_TOKEN, *tokenizer.all_special_ids])
        if template == "qwen_1_5":
            self._im_start, self._im_end, self._newline = (
                self._single_id(text) for text in ("<|im_start|>", "<|im_end|>", "\n")
            )
            self._special_ids = np.append(self._special_ids, [self._im_start, self._im_end])

    def _single_id(self, text: str) -> int:
        """Returns the id of a text that has to be one token."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        if len(ids) != 1:
            raise UserError(
                f"The tokenizer encodes {text!r} as {len(ids)} tokens {ids}, but the template 'qwen_1_5' needs one "
                "token; use the tokenizer of a chat model with ChatML."
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
        if any(turn.images for turn in turns):
            turns = move_images(turns)
        if self.template == "plain":
            return self._plain(turns)
        turns = _without_leading_answer(turns)
        if not any(turn.role == "assistant" for turn in turns):
            raise SkipRecord("no_answer", "No message of the assistant follows a message of the user.")
        return self._chatml(turns)

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
        if self.template == "plain":
            return self._plain([*turns, Turn("assistant")], prompt=True)
        return self._chatml(_without_leading_answer(turns), prompt=True)

    def _chatml(self, turns: list[Turn], prompt: bool = False) -> TokenisedConversation:
        """Encodes turns as ChatML."""
        messages = list(enumerate(turns))
        if turns[0].role != "system":
            messages.insert(0, (-1, Turn("system", SYSTEM_MESSAGE)))
        texts = [[f"<|im_start|>{turn.role}\n", *turn.parts, "<|im_end|>\n"] for _, turn in messages]
        if prompt:
            messages.append((len(turns), Turn("assistant")))
            texts.append(["<|im_start|>assistant\n"])
        first_user = next((i for i, (_, turn) in enumerate(messages) if turn.role == "user"), None)
        parts = []
        for i, encoded in enumerate(self._encode(texts)):
            index, turn = messages[i]
            role = turn.role
            begin = len("<|im_start|>") + len(role) + 1
            end = begin + len(turn.text)
            inside = encoded.within(begin, end)
            loss = np.zeros(len(encoded.ids), bool)
            if not prompt and self.label_quirk:
                loss[:] = role == "assistant"
                loss |= np.isin(encoded.ids, [self._newline, self._im_start, self._im_end])
            elif not prompt and role == "assistant":
                loss = inside | ((encoded.ids == self._im_end) & (encoded.start == end))
            pooled = {
                "none": False,
                "first_turn": i == first_user,
                "all_human": role == "user",
                "all": role != "system",
            }
            text_token = inside & encoded.after_image & self._is_text(encoded) & pooled[self.text_pool]
            parts.append(
                _Message(
                    tokens=encoded.ids,
                    loss_mask=loss & (encoded.ids != IMAGE_TOKEN),
                    text_token_mask=text_token,
                    role=ROLES[role],
                    turn=index,
                )
            )
        return _joined(parts)

    def _plain(self, turns: list[Turn], prompt: bool = False) -> TokenisedConversation:
        """Encodes an image and its caption."""
        if [turn.role for turn in turns] != ["user", "assistant"]:
            found = [turn.role for turn in turns]
            raise SkipRecord(
                "wrong_template",
                f"The template 'plain' needs one user turn and one assistant turn, but the roles are {found}.",
            )
        if not turns[0].images:
            raise SkipRecord("wrong_template", "The template 'plain' needs an image in the user turn, but has none.")
        caption = () if prompt else (*turns[1].parts, "\n")
        (encoded,) = self._encode([[IMAGE, *caption]])
        is_user = np.arange(len(encoded.ids)) == 0
        inside = encoded.within(len(IMAGE_PLACEHOLDER), len(IMAGE_PLACEHOLDER) + len(turns[1].text))
        text_token = inside & self._is_text(encoded) & (self.text_pool == "all")
        return TokenisedConversation(
            tokens=encoded.ids,
            loss_mask=encoded.ids != IMAGE_TOKEN,
            text_token_mask=text_token,
            roles=np.where(is_user, Role.USER, Role.ASSISTANT).astype(np.int8),
            turns=np.where(is_user, 0, 1).astype(np.int32),
        )

    def _is_text(self, encoded: _Encoded) -> Bool[np.ndarray, " n"]:
        """Marks the tokens that are neither images nor special tokens."""
        return ~np.isin(encoded.ids, self._special_ids)

    def _encode(self, messages: Sequence[Sequence[Part]]) -> list[_Encoded]:
        """Tokenises the texts between the images, in one call for all messages."""
        pieces = [_between_images(parts) for parts in messages]
        flat = [piece for message in pieces for piece in message]
        if self.tokenizer.truncation is not None or self.tokenizer.padding is not None:
            # Another user of the same tokenizer may have switched these on.
            self.tokenizer.no_truncation()
            self.tokenizer.no_padding()
        encodings = iter(self.tokenizer.encode_batch(flat, add_special_tokens=False))
        return [_Encoded.of(message, [next(encodings) for _ in message]) for message in pieces]


def _between_images(parts: Sequence[Part]) -> list[str]:
    """Returns the texts before, between and behind the images of a message, some of which may be empty."""
    pieces = [""]
    for part in parts:
        if isinstance(part, ImagePart):
            pieces.append("")
        else:
            pieces[-1] += part
    return pieces


@dataclass(frozen=True)
class _Encoded:
    """The tokens of one message with their half-open character spans in it."""

    ids: Int[np.ndarray, " n"]
    start: Int[np.ndarray, " n"]
    end: Int[np.ndarray, " n"]
    # True behind the first image, or everywhere in a message without one, except for the white space that follows an
    # image.
    after_image: Bool[np.ndarray, " n"]

    @classmethod
    def of(cls, pieces: list[str], encodings: list[tokenizers.Encoding]) -> _Encoded:
        """Joins the encodings of the pieces of a message, with one IMAGE_TOKEN between any two pieces."""
        ids, spans, after, offset = [], [], [], 0
        for k, (piece, encoding) in enumerate(zip(pieces, encodings, strict=True)):
            if k > 0:
                ids.append(IMAGE_TOKEN)
                spans.append((offset - len(IMAGE_PLACEHOLDER), offset))
                after.append(False)
            text_begins = len(piece) - len(piece.lstrip()) if k > 0 else 0
            ids += encoding.ids
            spans += [(offset + a, offset + b) for a, b in encoding.offsets]
            after += [(k > 0 or len(pieces) == 1) and b > text_begins for _, b in encoding.offsets]
            offset += len(piece) + len(IMAGE_PLACEHOLDER)
        start, end = np.asarray(spans, np.int32).reshape(-1, 2).T
        return cls(np.asarray(ids, np.int32), start, end, np.asarray(after, bool))

    def within(self, begin: int, end: int) -> Bool[np.ndarray, " n"]:
        """Marks the tokens that hold any of the characters begin..end-1."""
        return ((self.end > begin) | (self.start >= begin)) & (self.start < end)


@dataclass(frozen=True)
class _Message:
    """The tokens and masks of one message."""

    tokens: Int[np.ndarray, " n"]
    loss_mask: Bool[np.ndarray, " n"]
    text_token_mask: Bool[np.ndarray, " n"]
    role: Role
    turn: int


def _joined(messages: list[_Message]) -> TokenisedConversation:
    """Concatenates the messages of a conversation."""
    lengths = [len(message.tokens) for message in messages]
    return TokenisedConversation(
        tokens=np.concatenate([message.tokens for message in messages]),
        loss_mask=np.concatenate([message.loss_mask for message in messages]),
        text_token_mask=np.concatenate([message.text_token_mask for message in messages]),
        roles=np.repeat(np.asarray([message.role for message in messages], np.int8), lengths),
        turns=np.repeat(np.asarray([message.turn for message in messages], np.int32), lengths),
    )


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
