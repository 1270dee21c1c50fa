"""`vr-jax chat`: asks a checkpoint about images."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vr_jax.cli.flags import Command, flag
from vr_jax.cli.shared import AnswerFlags, load_generator
from vr_jax.errors import UserError
from vr_jax.inference import Chat, Sampling
from vr_jax.path_text import PathText

PROMPT = "> "


@dataclass(frozen=True, kw_only=True)
class ChatFlags(AnswerFlags):
    """The flags of `vr-jax chat`."""

    question: str | None = flag(
        None, "The question. Without one, questions are read line by line from standard input.", positional=True
    )
    image: tuple[PathText, ...] = flag((), "An image of the first question.", metavar="FILE")


def run(flags: ChatFlags) -> None:
    """Answers the question, or talks until the end of the input."""
    sampling = Sampling(flags.temperature, flags.top_p, flags.seed)
    with load_generator(flags) as (generator, processor):
        chat = Chat(generator, processor, [Path(image) for image in flags.image])
        if flags.question is not None:
            _show(chat.ask(flags.question, flags.max_new_tokens, sampling))
        else:
            _talk(chat, flags.max_new_tokens, sampling)


def _talk(chat: Chat, max_new_tokens: int, sampling: Sampling) -> None:
    interactive = sys.stdin.isatty()
    if interactive:
        print("Ask about the images; an empty line or Ctrl-D ends the conversation.")
    while True:
        try:
            question = input(PROMPT if interactive else "").strip()
        except EOFError:
            return
        if not question:
            return
        try:
            _show(chat.ask(question, max_new_tokens, sampling))
        except UserError as error:
            # A question that cannot be asked does not end the conversation.
            print(f"vr-jax chat: {error}", file=sys.stderr)


def _show(pieces: Iterator[str]) -> None:
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


COMMAND = Command(
    summary="Ask a checkpoint about images, once or in a conversation.",
    flags=ChatFlags,
    run=run,
    details="The images belong to the first question. Later questions of a conversation are about the same images.",
    examples=(
        'vr-jax chat --checkpoint=runs/demo/model --image=chart.png "What is the highest value?"',
        "vr-jax chat --checkpoint=runs/demo/model --image=a.png --image=b.png",
    ),
)
