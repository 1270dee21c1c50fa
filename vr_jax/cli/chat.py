"""`vr-jax chat`: asks a checkpoint about images."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from vr_jax.cli.flags import Command, flag, unknown
from vr_jax.cli.shared import MAX_NEW_TOKENS, AnswerFlags, load_generator
from vr_jax.errors import UserError
from vr_jax.inference import Chat, Sampling
from vr_jax.path_text import PathText, is_bucket

PROMPT = "> "
COMMANDS = {
    "/image FILE": "adds an image, which belongs to the next question",
    "/reset": "forgets the questions, the answers and the images",
    "/help": "lists these commands",
    "/exit": "ends the conversation, as an empty line and Ctrl-D do",
}
# A question may begin with a slash, e.g. "/usr/bin is what?"; a command is a word and nothing that looks like a path.
_COMMAND = re.compile(r"(/[A-Za-z]+)(?:\s+(.*))?")


@dataclass(frozen=True, kw_only=True)
class ChatFlags(AnswerFlags):
    """The flags of `vr-jax chat`."""

    question: str | None = flag(
        None, "The question. Without one, questions are read line by line from standard input.", positional=True
    )
    image: tuple[PathText, ...] = flag((), "An image of the first question.", metavar="FILE")
    system: str | None = flag(None, "System message. The default is that of the chat template.", metavar="TEXT")


def run(flags: ChatFlags) -> None:
    """Answers the question, or talks until the end of the input."""
    sampling = Sampling(flags.temperature, flags.top_p, flags.seed)
    with load_generator(flags) as (generator, processor):
        limit = flags.max_new_tokens or generator.settings.max_new_tokens or MAX_NEW_TOKENS
        chat = Chat(generator, processor, flags.image, system=flags.system)
        if flags.question is not None:
            _show(chat.ask(flags.question, limit, sampling))
        else:
            _talk(chat, limit, sampling)


def _talk(chat: Chat, max_new_tokens: int, sampling: Sampling) -> None:
    interactive = sys.stdin.isatty()
    if interactive:
        print("Ask about the images; /help lists commands, an empty line or Ctrl-D ends the conversation.")
    while True:
        try:
            line = input(PROMPT if interactive else "").strip()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise UserError(f"standard input is not UTF-8 ({error.reason}); save the questions as UTF-8") from error
        if not line or line == "/exit":
            return
        try:
            if found := _COMMAND.fullmatch(line):
                _obey(chat, found[1], (found[2] or "").strip())
            else:
                _show(chat.ask(line, max_new_tokens, sampling))
        except UserError as error:
            # A question that cannot be asked does not end the conversation.
            print(f"vr-jax chat: {error}", file=sys.stderr)


def _obey(chat: Chat, command: str, text: str) -> None:
    """Carries out a command of the conversation.

    Raises:
        UserError: The command is unknown or cannot be carried out; the conversation stays as it was.
    """
    if command == "/image":
        chat.add_images(_files(text))
    elif command == "/reset":
        chat.reset()
    elif command == "/help":
        print("\n".join(f"{name:<12}  {what}" for name, what in COMMANDS.items()))
    else:
        raise UserError(unknown("command", command, [name.split()[0] for name in COMMANDS]))


def _files(text: str) -> list[str]:
    """Returns the files that a line names: one as it stands, or several as a shell reads them.

    Raises:
        UserError: The line names none.
    """
    if not text:
        raise UserError("/image FILE: the name of a file is missing")
    if is_bucket(text) or os.path.exists(os.path.expanduser(text)):  # a home folder that is not known is no error here
        return [text]
    try:
        return shlex.split(text)
    except ValueError:  # a quotation mark stands alone
        return [text]


def _show(pieces: Iterator[str]) -> None:
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


COMMAND = Command(
    summary="Ask a checkpoint about images, once or in a conversation.",
    flags=ChatFlags,
    run=run,
    details="""The images belong to the first question, and /image FILE adds one to a later question of a conversation.
    Photographs are turned as their EXIF orientation says.

    In a conversation, """
    + "; ".join(f"{name} {what}" for name, what in COMMANDS.items())
    + ".",
    examples=(
        'vr-jax chat --checkpoint=runs/demo/model --image=chart.png "What is the highest value?"',
        'vr-jax chat --checkpoint=runs/demo/model --image=a.png --image=b.png --system="Answer in one word."',
    ),
)
