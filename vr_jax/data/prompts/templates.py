"""The named chat formats, one declarative record each, as the official code writes them.

`docs/design/methods.md#chat-formats` has the sources and the facts that are easily missed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from vr_jax.data.prompts.segments import LLAVA_SEPARATORS, ROLES, Kind, Role, Segment, without_empty
from vr_jax.data.skips import SkipRecord
from vr_jax.data.types import IMAGE, ImagePart, Marker, Turn

_HELPFUL = "You are a helpful assistant."
_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_LLAMA_3 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)


@dataclass(frozen=True, kw_only=True)
class Message:
    """The text around the messages of one speaker.

    Attributes:
        header: What begins a message. A prompt ends with the header of the assistant.
        before: What stands between the header and the message, and is no part of a prompt's end.
        end: What closes a message.
        after: What separates a closed message from the next one.
    """

    header: str = ""
    before: str = ""
    end: str = ""
    after: str = ""


@dataclass(frozen=True, kw_only=True)
class NamedTemplate:
    """A chat format (see `ChatFormat` for the attributes that are not listed).

    Attributes:
        start: The text that every conversation begins with.
        system: The text around a system message; None where the format has no system messages.
        user: The text around a user's message.
        assistant: The text around the assistant's message.
        system_message: The system message of a conversation that has none; an empty text writes none.
        system_inside: Whether the system message stands inside the first message of the user.
        system_anywhere: Whether system messages may stand behind the first message.
        alternates: Whether user and assistant have to take turns.
        trims: Whether white space around each message is dropped.
        closes_last_only: Whether `end` stands behind the conversation's last message only.
        behind_image: The text that follows an image.
    """

    name: str
    start: str = ""
    system: Message | None
    user: Message
    assistant: Message
    system_message: str = ""
    system_inside: bool = False
    system_anywhere: bool = False
    alternates: bool = False
    trims: bool = False
    closes_last_only: bool = False
    behind_image: str = ""
    bos: bool = False
    moves_images: bool = True
    drops_newlines: bool = False
    separators: tuple[str, str] = LLAVA_SEPARATORS
    end_tokens: tuple[str, ...]
    closes_replies: bool = True
    quirk_tokens: tuple[str, ...] = ()
    single_tokens: tuple[str, ...] = ()
    markers: Mapping[Marker, str] = field(default_factory=dict)

    def write(self, turns: Sequence[Turn], *, prompt: bool) -> list[Segment]:
        """Writes a conversation; see `ChatFormat.write`."""
        self._check(turns)
        messages = list(enumerate(turns))
        if turns[0].role != "system" and self.system_message:
            messages.insert(0, (-1, Turn("system", self.system_message)))
        segments = [Segment(self.start, Role.SYSTEM, -1)]
        inside: list[Segment] = []  # The system message that the next message of the user holds.
        for index, turn in messages:
            last = not prompt and index == len(turns) - 1
            written = list(self._message(index, turn, inside, last=last))
            inside = written if turn.role == "system" and self.system_inside else []
            segments += [] if inside else written
        if prompt:
            segments.append(Segment(self.assistant.header, Role.ASSISTANT, len(turns)))
        return without_empty(segments)

    def _message(self, index: int, turn: Turn, inside: Sequence[Segment], *, last: bool) -> Iterator[Segment]:
        role = ROLES[turn.role]
        around = {"system": self.system, "user": self.user, "assistant": self.assistant}[turn.role] or Message()
        yield Segment(around.header, role, index)
        yield Segment(around.before, role, index, Kind.REPLY)
        if role == Role.USER:
            yield from inside
        for part in (_trimmed(turn) if self.trims else turn).parts:
            yield Segment(part, role, index, Kind.CONTENT)
            if isinstance(part, ImagePart):
                yield Segment(self.behind_image, role, index)
        if last or not self.closes_last_only:
            yield Segment(around.end, role, index, Kind.REPLY)
        yield Segment(around.after, role, index)

    def _check(self, turns: Sequence[Turn]) -> None:
        roles = [turn.role for turn in turns]
        if "system" in roles and self.system is None:
            self._refuse("has no system messages, but the conversation has one")
        if "system" in roles[1:] and not self.system_anywhere:
            self._refuse("has a system message only at the beginning, but the conversation has another one")
        talk = [role for role in roles if role != "system"]
        if self.alternates and talk != [("user", "assistant")[k % 2] for k in range(len(talk))]:
            self._refuse(f"needs messages of user and assistant in turn, but the roles are {roles}")

    def _refuse(self, what: str) -> None:
        raise SkipRecord("wrong_template", f"The template {self.name!r} {what}.")


def _trimmed(turn: Turn) -> Turn:
    """Returns a message without the white space at its beginning and its end; an image is no white space."""
    parts = list(turn.parts)
    if parts and not isinstance(parts[0], ImagePart):
        parts[0] = parts[0].lstrip()
    if parts and not isinstance(parts[-1], ImagePart):
        parts[-1] = parts[-1].rstrip()
    return Turn(turn.role, *parts)


def _chatml(role: str) -> Message:
    return Message(header=f"<|im_start|>{role}\n", end="<|im_end|>", after="\n")


def _header(role: str) -> Message:
    return Message(header=f"<|start_header_id|>{role}<|end_header_id|>\n\n", end="<|eot_id|>")


# Source: LLaVA-NeXT: llava/conversation.py, `conv_qwen`; llava/train/train.py, `preprocess_qwen`.
_QWEN_1_5 = NamedTemplate(
    name="qwen_1_5",
    system=_chatml("system"),
    user=_chatml("user"),
    assistant=_chatml("assistant"),
    system_message=_HELPFUL,
    system_anywhere=True,
    end_tokens=("<|im_end|>", "<|endoftext|>"),
    quirk_tokens=("\n", "<|im_start|>", "<|im_end|>"),
    single_tokens=("<|im_start|>", "<|im_end|>", "\n"),
)

# Source: LLaVA: llava/conversation.py, `conv_vicuna_v1`; llava/train/train.py, `preprocess_v1`.
_VICUNA_V1 = NamedTemplate(
    name="vicuna_v1",
    system=Message(after=" "),
    user=Message(header="USER:", before=" ", after=" "),
    assistant=Message(header="ASSISTANT:", before=" ", end="</s>"),
    system_message=_VICUNA,
    alternates=True,
    bos=True,
    end_tokens=("</s>",),
    single_tokens=("</s>",),
)

# Source: LLaVA-NeXT: llava/conversation.py, `conv_llava_llama_3`, which renders the template of Meta's tokenizer;
# llava/train/train.py, `preprocess_llama3`. The quirk there also names "\n\n", which no token of the vocabulary has as
# its name, so that it has no effect.
_LLAMA_3_TEMPLATE = NamedTemplate(
    name="llama_3",
    start="<|begin_of_text|>",
    system=_header("system"),
    user=_header("user"),
    assistant=_header("assistant"),
    system_message=_LLAMA_3,
    system_anywhere=True,
    trims=True,
    bos=True,
    end_tokens=("<|eot_id|>", "<|end_of_text|>"),
    quirk_tokens=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    single_tokens=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)

# Source: LLaVA: llava/conversation.py, `conv_mistral_instruct` and the separator style LLAMA_2.
_MISTRAL_INSTRUCT = NamedTemplate(
    name="mistral_instruct",
    system=Message(header="<<SYS>>\n", after="\n<</SYS>>\n\n"),
    user=Message(header="[INST] ", after=" [/INST]"),
    assistant=Message(before=" ", end=" </s>"),
    system_inside=True,
    alternates=True,
    bos=True,
    end_tokens=("</s>",),
    single_tokens=("</s>",),
)

# Source: MiniCPM-V-2@1878519: modeling_minicpmv.py, `MiniCPMV.chat`, for prompts; OpenBMB/MiniCPM-V@0dbb566:
# finetune/dataset.py, `conversation_to_ids_minicpm`, for training, which closes the last message only.
_MINICPM_V = NamedTemplate(
    name="minicpm_v",
    system=None,
    user=Message(header="<用户>"),
    assistant=Message(header="<AI>", end="</s>"),
    closes_last_only=True,
    behind_image="\n",
    bos=True,
    moves_images=False,
    drops_newlines=True,
    separators=("", ""),
    end_tokens=("</s>",),
    single_tokens=("</s>",),
    markers={
        Marker.IMAGE_START: "<image>",
        Marker.IMAGE_END: "</image>",
        Marker.SLICE_START: "<slice>",
        Marker.SLICE_END: "</slice>",
        Marker.ROW_END: "\n",
    },
)

# Source: the chat template of Qwen2.5-VL's processor.
_QWEN2_VL = replace(
    _QWEN_1_5,
    name="qwen2_vl",
    moves_images=False,
    drops_newlines=True,
    separators=("", ""),
    quirk_tokens=(),
    markers={Marker.IMAGE_START: "<|vision_start|>", Marker.IMAGE_END: "<|vision_end|>"},
)

NAMED = {one.name: one for one in (_QWEN_1_5, _VICUNA_V1, _LLAMA_3_TEMPLATE, _MISTRAL_INSTRUCT, _MINICPM_V, _QWEN2_VL)}


@dataclass(frozen=True)
class Plain:
    """LLaVA's captions of the first phase: an image, its caption and a newline (see `ChatFormat` for the attributes).

    Source: LLaVA-NeXT: llava/train/train.py, `preprocess_plain`.

    Attributes:
        markers: Those of the model's chat format.
    """

    markers: Mapping[Marker, str] = field(default_factory=dict)
    name: str = "plain"
    bos: bool = True
    moves_images: bool = True
    drops_newlines: bool = False
    separators: tuple[str, str] = LLAVA_SEPARATORS
    end_tokens: tuple[str, ...] = ()
    closes_replies: bool = True
    quirk_tokens: tuple[str, ...] = ()
    single_tokens: tuple[str, ...] = ()

    def write(self, turns: Sequence[Turn], *, prompt: bool) -> list[Segment]:
        """Writes an image and its caption; see `ChatFormat.write`. In a prompt the caption is left out."""
        roles = [turn.role for turn in turns]
        if roles != ["user", "assistant"][: 1 if prompt else 2]:
            raise SkipRecord(
                "wrong_template",
                f"The template 'plain' needs one user turn and one assistant turn, but the roles are {roles}.",
            )
        if not turns[0].images:
            raise SkipRecord("wrong_template", "The template 'plain' needs an image in the user turn, but has none.")
        segments = [Segment(IMAGE, Role.USER, 0, Kind.CONTENT)]
        if not prompt:
            segments += [Segment(part, Role.ASSISTANT, 1, Kind.CONTENT) for part in turns[1].parts]
            segments.append(Segment("\n", Role.ASSISTANT, 1, Kind.REPLY))
        return segments
