"""From turns to token ids, with the masks that training and the text-guided token need (methods.md 1.4, 5.5).

Two templates behind one schema: `qwen_1_5` (ChatML) and `plain` (captions). Ids and labels are those of LLaVA-NeXT's
`preprocess_multimodal`, `preprocess_qwen` and `preprocess_plain` (`llava/train/train.py`), which the recorded cases
in tests/golden check. Who said what is carried as `roles` and `turns`; it is never derived from labels.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import tokenizers
from jaxtyping import Bool, Int

from vr_jax.data.skips import SkipRecord
from vr_jax.data.types import IMAGE_PLACEHOLDER, Turn

IMAGE_TOKEN = -200  # stands for a whole image until its vision tokens are spliced in (LLaVA's IMAGE_TOKEN_INDEX)
SYSTEM_MESSAGE = "You are a helpful assistant."
VIDEO_NOISE = "QA_GT_caption_based_noisy"  # LLaVA removes this marker of VideoInstruct-100k

Template = Literal["qwen_1_5", "plain"]
TextPool = Literal["none", "first_turn", "all_human", "all"]


class Role(enum.IntEnum):
    SYSTEM = 0
    USER = 1
    ASSISTANT = 2


ROLES = {"system": Role.SYSTEM, "user": Role.USER, "assistant": Role.ASSISTANT}


@dataclass(frozen=True)
class TokenisedConversation:
    """n tokens of one sample; each image is one IMAGE_TOKEN, in no mask."""

    tokens: Int[np.ndarray, " n"]
    loss_mask: Bool[np.ndarray, " n"]  # the token is a target
    text_token_mask: Bool[np.ndarray, " n"]  # the text-guided token may pool it
    roles: Int[np.ndarray, " n"]  # Role of the message it belongs to
    turns: Int[np.ndarray, " n"]  # 0.. index of that message, -1 for the default system message


def move_placeholders(turns: Sequence[Turn]) -> list[Turn]:
    """`preprocess_multimodal`: a message's only image goes to its front; several stay where they are."""
    moved = []
    for turn in turns:
        text = turn.text
        if text.count(IMAGE_PLACEHOLDER) == 1 and not text.startswith(IMAGE_PLACEHOLDER):
            rest = text.replace(IMAGE_PLACEHOLDER, "").strip()
            text = f"{IMAGE_PLACEHOLDER}\n{rest}".strip()
        moved.append(Turn(turn.role, text.replace(VIDEO_NOISE, "")))
    return moved


class ChatEncoder:
    """Turns -> TokenisedConversation with a Hugging Face fast tokenizer.

    template: "qwen_1_5" or "plain". label_quirk: LLaVA's targets (whole assistant messages with their header, and
    every newline, <|im_start|> and <|im_end|> token anywhere); False: answers and the <|im_end|> that closes them.
    text_pool: the text that `text_token_mask` marks, see `VisionRememberConfig.text_pool`.
    Raises ValueError for a tokenizer that cannot write the template."""

    def __init__(self, tokenizer: Any, template: Template, label_quirk: bool, text_pool: TextPool):
        if template not in ("qwen_1_5", "plain"):
            raise ValueError(f"unknown template {template!r}: expected 'qwen_1_5' or 'plain'")
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(f"{type(tokenizer).__name__} is not a fast tokenizer: it cannot give character offsets")
        if tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no pad token; set tokenizer.pad_token (Qwen2: '<|endoftext|>')")
        # Only the Rust tokenizer is kept: worker processes then need neither transformers nor the torch it imports.
        self.tokenizer: tokenizers.Tokenizer = tokenizer.backend_tokenizer
        self.template = template
        self.label_quirk = label_quirk
        self.text_pool = text_pool
        self.pad_id: int = tokenizer.pad_token_id
        self.special_ids = np.asarray([IMAGE_TOKEN, *tokenizer.all_special_ids])
        if template == "qwen_1_5":
            self.im_start, self.im_end, self.newline = (
                self._single_id(text) for text in ("<|im_start|>", "<|im_end|>", "\n")
            )
            self.special_ids = np.append(self.special_ids, [self.im_start, self.im_end])

    def _single_id(self, text: str) -> int:
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        if len(ids) != 1:
            raise ValueError(
                f"the tokenizer writes {text!r} as {len(ids)} tokens {ids}: ChatML needs it to be one token"
            )
        return ids[0]

    def sample(self, turns: Sequence[Turn], *, has_image: bool) -> TokenisedConversation:
        """A training sample. Without images a literal placeholder is ordinary text, as in LLaVA.

        Raises SkipRecord for an unknown role, wrong types, an empty conversation or one without an answer."""
        turns = _checked(turns)
        if has_image:
            turns = move_placeholders(turns)
        if self.template == "plain":
            return self._plain(turns, has_image)
        turns = _without_leading_answer(turns)
        if not any(turn.role == "assistant" for turn in turns):
            raise SkipRecord("no_answer", "no assistant turn follows a human one")
        return self._chatml(turns, has_image)

    def prompt(self, turns: Sequence[Turn], *, has_image: bool) -> TokenisedConversation:
        """What the model is asked: it ends with the assistant header; a final assistant turn (the reference) is left
        out; nothing is a target. Placeholders stay where they are. Raises SkipRecord as `sample` does."""
        turns = _checked(turns)
        while turns and turns[-1].role == "assistant":
            turns.pop()
        if self.template == "plain":
            return self._plain([*turns, Turn("assistant", "")], has_image, prompt=True)
        return self._chatml(_without_leading_answer(turns), has_image, prompt=True)

    def _chatml(self, turns: list[Turn], has_image: bool, prompt: bool = False) -> TokenisedConversation:
        messages = [(index, turn.role, turn.text) for index, turn in enumerate(turns)]
        if turns[0].role != "system":
            messages.insert(0, (-1, "system", SYSTEM_MESSAGE))
        texts = [f"<|im_start|>{role}\n{content}<|im_end|>\n" for _, role, content in messages]
        if prompt:
            messages.append((len(turns), "assistant", ""))
            texts.append("<|im_start|>assistant\n")
        first_user = next((i for i, (_, role, _) in enumerate(messages) if role == "user"), None)
        parts = []
        for i, encoded in enumerate(self._encode(texts, has_image)):
            index, role, content = messages[i]
            begin = len("<|im_start|>") + len(role) + 1
            end = begin + len(content)
            inside = encoded.within(begin, end)
            loss = np.zeros(len(encoded.ids), bool)
            if not prompt and self.label_quirk:
                loss[:] = role == "assistant"
                loss |= np.isin(encoded.ids, [self.newline, self.im_start, self.im_end])
            elif not prompt and role == "assistant":
                loss = inside | ((encoded.ids == self.im_end) & (encoded.start == end))
            pooled = {
                "none": False,
                "first_turn": i == first_user,
                "all_human": role == "user",
                "all": role != "system",
            }
            text_token = inside & encoded.after_image & self._is_text(encoded) & pooled[self.text_pool]
            parts.append((encoded.ids, loss & (encoded.ids != IMAGE_TOKEN), text_token, ROLES[role], index))
        return _joined(parts)

    def _plain(self, turns: list[Turn], has_image: bool, prompt: bool = False) -> TokenisedConversation:
        if [turn.role for turn in turns] != ["user", "assistant"]:
            found = [turn.role for turn in turns]
            raise SkipRecord("wrong_template", f"'plain' needs one user and one assistant turn, found {found}")
        if not has_image or IMAGE_PLACEHOLDER not in turns[0].text:
            raise SkipRecord("wrong_template", "'plain' needs an image in the user turn, found none")
        caption = "" if prompt else turns[1].text + "\n"
        (encoded,) = self._encode([IMAGE_PLACEHOLDER + caption], has_image)
        human = np.arange(len(encoded.ids)) == 0
        inside = encoded.within(len(IMAGE_PLACEHOLDER), len(IMAGE_PLACEHOLDER) + len(turns[1].text))
        text_token = inside & self._is_text(encoded) & (self.text_pool == "all")
        return TokenisedConversation(
            tokens=encoded.ids,
            loss_mask=encoded.ids != IMAGE_TOKEN,
            text_token_mask=text_token,
            roles=np.where(human, Role.USER, Role.ASSISTANT).astype(np.int8),
            turns=np.where(human, 0, 1).astype(np.int32),
        )

    def _is_text(self, encoded: _Encoded) -> Bool[np.ndarray, " n"]:
        return ~np.isin(encoded.ids, self.special_ids)

    def _encode(self, texts: list[str], has_image: bool) -> list[_Encoded]:
        """Tokenises between the placeholders, in one call for all texts."""
        pieces = [text.split(IMAGE_PLACEHOLDER) if has_image else [text] for text in texts]
        flat = [piece for text in pieces for piece in text]
        if self.tokenizer.truncation is not None or self.tokenizer.padding is not None:
            self.tokenizer.no_truncation()  # somebody else used the same tokenizer with these options
            self.tokenizer.no_padding()
        encodings = iter(self.tokenizer.encode_batch(flat, add_special_tokens=False))
        return [_Encoded.of(text, [next(encodings) for _ in text]) for text in pieces]


@dataclass(frozen=True)
class _Encoded:
    """Tokens of one message with their half-open character spans in it."""

    ids: Int[np.ndarray, " n"]
    start: Int[np.ndarray, " n"]
    end: Int[np.ndarray, " n"]
    # Behind the first placeholder, if there is one, and not the white space that follows a placeholder.
    after_image: Bool[np.ndarray, " n"]

    @classmethod
    def of(cls, pieces: list[str], encodings: list[tokenizers.Encoding]) -> _Encoded:
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
        """Tokens that hold any of the characters begin..end-1."""
        return ((self.end > begin) | (self.start >= begin)) & (self.start < end)


def _joined(parts: list[tuple]) -> TokenisedConversation:
    tokens, loss, text_token, roles, turns = zip(*parts, strict=True)
    lengths = [len(ids) for ids in tokens]
    return TokenisedConversation(
        tokens=np.concatenate(tokens),
        loss_mask=np.concatenate(loss),
        text_token_mask=np.concatenate(text_token),
        roles=np.repeat(np.asarray(roles, np.int8), lengths),
        turns=np.repeat(np.asarray(turns, np.int32), lengths),
    )


def _checked(turns: Sequence[Turn]) -> list[Turn]:
    if not turns:
        raise SkipRecord("empty_conversation", "no turns")
    for k, turn in enumerate(turns):
        if turn.role not in ROLES:
            raise SkipRecord("unknown_role", f"turn {k}: role {turn.role!r}, expected one of {list(ROLES)}")
        if not isinstance(turn.text, str):
            raise SkipRecord("malformed_record", f"turn {k}: the text is a {type(turn.text).__name__}, expected str")
        if not turn.text.isascii():
            try:
                turn.text.encode()
            except UnicodeEncodeError as error:
                raise SkipRecord("malformed_record", f"turn {k}: text is not valid Unicode: {error}") from error
    return list(turns)


def _without_leading_answer(turns: list[Turn]) -> list[Turn]:
    """LLaVA drops a first turn that is not human; a system turn instead replaces the default system message."""
    system = turns[:1] if turns and turns[0].role == "system" else []
    rest = turns[len(system) :]
    if rest and rest[0].role == "assistant":
        rest = rest[1:]
    if not rest:
        raise SkipRecord("empty_conversation", "no human turn")
    return system + rest
