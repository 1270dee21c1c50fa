"""Talks to a checkpoint: python -m vr_jax.cli.chat --checkpoint DIR --image a.png "question". See docs/evaluate.md."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

import jax
from jax.sharding import Mesh

from vr_jax.compilation import use_compilation_cache
from vr_jax.data.processor import Processor
from vr_jax.data.skips import SkipRecord
from vr_jax.data.types import Conversation, Example, Turn
from vr_jax.inference.buckets import PromptTooLong
from vr_jax.inference.generate import Generator
from vr_jax.inference.loading import LOADING_ERRORS, load_for_inference, with_pruning
from vr_jax.inference.prompts import PromptError, user_turn
from vr_jax.inference.sampling import Sampling
from vr_jax.model_directory import read_config
from vr_jax.sharding import make_mesh

PROMPT = "> "


def main(arguments: Sequence[str] | None = None) -> int:
    """Answers the question, or talks until the end of the input; returns the exit status. Wrong input is one line on
    standard error."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        sampling = Sampling(options.temperature, options.top_p, options.seed)
    except ValueError as error:
        parser.error(str(error))
    use_compilation_cache()
    try:
        with _mesh(options.tensor) as mesh:
            config = with_pruning(read_config(options.checkpoint), options.pruning)
            loaded = load_for_inference(options.checkpoint, mesh, config=config, dtype=options.dtype)
            chat = Chat(Generator(loaded.model, loaded.tokenizer), loaded.processor, options.image)
            if options.question is not None:
                _show(chat.ask(options.question, options.max_new_tokens, sampling), sys.stdout)
            else:
                _talk(chat, options.max_new_tokens, sampling)
    except (*LOADING_ERRORS, ChatError, OSError) as error:
        print(f"vr_jax.cli.chat: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


class ChatError(ValueError):
    """A question or image that cannot be used; one line for the user."""


class Chat:
    """A conversation about images, which belong to the first question.

    Every turn is prefilled with the whole conversation: a text-guided token may pool later questions too, so what
    Vision Remember did to the vision tokens cannot be kept from turn to turn.

    Raises ChatError for an image that cannot be used."""

    def __init__(self, generator: Generator, processor: Processor, images: Sequence[Path]):
        self.generator = generator
        self.processor = processor
        self.images = tuple(images)
        self.turns: tuple[Turn, ...] = ()
        self._prompt((user_turn("", len(images)),))  # images are read now, not after the first question

    def ask(self, question: str, max_new_tokens: int, sampling: Sampling) -> Iterator[str]:
        """Pieces of the answer as they are decoded. A question that fails, or whose answer is not read to its end,
        leaves no trace. Raises ChatError for placeholders that do not match the images, or a conversation that
        became too long."""
        try:
            turn = user_turn(question, 0 if self.turns else len(self.images))
            turns = (*self.turns, turn)
            pieces = []
            stream = self.generator.stream(self._prompt(turns), max_new_tokens=max_new_tokens, sampling=sampling)
            for piece in stream:
                pieces.append(piece)
                yield piece
        except (PromptError, PromptTooLong) as error:
            raise ChatError(str(error)) from error
        self.turns = (*turns, Turn("assistant", "".join(pieces)))

    def _prompt(self, turns: tuple[Turn, ...]) -> Example:
        try:
            return self.processor.prompt(Conversation("chat", turns, self.images))
        except SkipRecord as error:
            raise ChatError(error.detail) from error


def _talk(chat: Chat, max_new_tokens: int, sampling: Sampling) -> None:
    """Reads questions line by line until the end of the input."""
    interactive = sys.stdin.isatty()
    if interactive:
        print("Ask about the image(s); an empty line or Ctrl-D ends.")
    while True:
        try:
            question = input(PROMPT if interactive else "").strip()
        except EOFError:
            return
        if not question:
            return
        try:
            _show(chat.ask(question, max_new_tokens, sampling), sys.stdout)
        except ChatError as error:
            print(f"vr_jax.cli.chat: {error}", file=sys.stderr)


def _show(pieces: Iterator[str], out: TextIO) -> None:
    for piece in pieces:
        out.write(piece)
        out.flush()
    out.write("\n")


@contextlib.contextmanager
def _mesh(tensor: int) -> Iterator[Mesh | None]:
    """One device, or a mesh of the first `tensor` devices."""
    if tensor == 1:
        yield None
        return
    mesh = make_mesh(1, 1, tensor, devices=jax.devices()[:tensor])
    with jax.set_mesh(mesh):
        yield mesh


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m vr_jax.cli.chat", description="Asks a checkpoint about images.")
    parser.add_argument("question", nargs="?", help="the question; without one, questions are read line by line")
    parser.add_argument("--checkpoint", type=Path, required=True, help="model directory")
    parser.add_argument("--image", type=Path, action="append", default=[], help="an image; may be given several times")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): greedy")
    parser.add_argument("--top_p", type=float, default=1.0, help="nucleus sampling, in (0, 1]")
    parser.add_argument("--max_new_tokens", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0, help="of the random draws at a temperature above 0")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: the checkpoint's")
    parser.add_argument("--pruning", help="drop vision tokens: fastv, pyramid_drop, vispruner, or JSON with fields")
    parser.add_argument("--tensor", type=int, default=1, help="devices to cut the model over (default 1)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
