"""The pieces that a chat format writes a conversation in, and what the encoder asks of a chat format."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from vr_jax.data.types import Marker, Part, Turn

# What stands between images and behind the last one where a question gives them no places: LLaVA's prompts.
LLAVA_SEPARATORS = (" ", "\n")


class Role(enum.IntEnum):
    """The speaker of a token, as a number that fits into an array."""

    SYSTEM = 0
    USER = 1
    ASSISTANT = 2


ROLES = {"system": Role.SYSTEM, "user": Role.USER, "assistant": Role.ASSISTANT}


class Kind(enum.Enum):
    """What a segment is.

    TEMPLATE is text of the chat format that a prompt has, and CONTENT a part of the message. REPLY is text of the chat
    format that a model has to write itself: what stands between the end of a prompt and the reply, and what closes it.
    """

    TEMPLATE = enum.auto()
    CONTENT = enum.auto()
    REPLY = enum.auto()


@dataclass(frozen=True)
class Segment:
    """A piece of a written conversation.

    Attributes:
        part: A text, or the place of an image.
        role: The speaker of the message that the piece belongs to.
        turn: The index of that message. The header that a prompt ends with has the index of the message that the model
            is asked for, and a default system message has -1.
        kind: What the piece is.
    """

    part: Part
    role: Role
    turn: int
    kind: Kind = Kind.TEMPLATE


class ChatFormat(Protocol):
    """What `ChatEncoder` needs of a chat format.

    Attributes:
        name: The name in `VlmConfig.template`.
        bos: Whether the token stands in front that the tokenizer puts in front of every text.
        moves_images: Whether training samples get their images as LLaVA's code places them.
        drops_newlines: Whether training samples lose the newline that LLaVA's records have behind an image.
        separators: What stands between images, and behind the last one, where a question gives them no places.
        end_tokens: The tokens that end a reply; the first one stands behind every reply that a format closes.
        closes_replies: Whether a token stands behind replies by which a model learns to end them.
        quirk_tokens: The tokens that LLaVA's code makes targets wherever they stand; empty where it has no such quirk.
        single_tokens: The texts that have to be one token each.
        markers: The texts of the tokens that a layout writes around vision tokens.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def bos(self) -> bool: ...  # noqa: D102
    @property
    def moves_images(self) -> bool: ...  # noqa: D102
    @property
    def drops_newlines(self) -> bool: ...  # noqa: D102
    @property
    def separators(self) -> tuple[str, str]: ...  # noqa: D102
    @property
    def end_tokens(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def closes_replies(self) -> bool: ...  # noqa: D102
    @property
    def quirk_tokens(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def single_tokens(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def markers(self) -> Mapping[Marker, str]: ...  # noqa: D102

    def write(self, turns: Sequence[Turn], *, prompt: bool) -> list[Segment]:
        """Writes a conversation.

        Args:
            turns: The messages.
            prompt: Whether the assistant's header follows, for the model to answer.

        Raises:
            SkipRecord: "wrong_template" where the format has no way to write these messages.
        """


def without_empty(segments: Iterable[Segment]) -> list[Segment]:
    """Returns the segments that have any character."""
    return [segment for segment in segments if segment.part != ""]
