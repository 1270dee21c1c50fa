"""Batched generation: one compiled prefill for each bucket of prompt lengths, and one decode loop."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Int

from vr_jax.data.collate import collate
from vr_jax.data.conversations import chat_format
from vr_jax.data.types import Example
from vr_jax.errors import UserError
from vr_jax.inference.buckets import Buckets
from vr_jax.inference.programs import Programs
from vr_jax.inference.sampling import Sampling
from vr_jax.inference.state import DecodeState, PromptBatch, Reply, on_devices
from vr_jax.inference.streaming import Piece, TextStream, decode_text
from vr_jax.inference.unstacked import unstacked_model
from vr_jax.model.batch import NEWLINE, NO_CELL, BatchShape
from vr_jax.model.config import Template
from vr_jax.model.spec import PromptSize
from vr_jax.model.vlm import VisionLanguageModel
from vr_jax.model_directory import GenerationSettings

# The end tokens of ChatML, for tokenizers without those of the model's chat format.
STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")


@dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
        compiled: What XLA compiled.
        argument_bytes: The size of everything that is passed to the program, whether it reads it or not. All of it
            stays on the devices while the program runs.
    """

    compiled: jax.stages.Compiled
    argument_bytes: int


class Generator:
    """Answers prompts in batches.

    Under `jax.set_mesh(mesh)` the rows of a batch are sharded over the axes 'replica' and 'fsdp' where their number
    divides; the parameters stay as they are sharded.

    Attributes:
        model: The model that answers.
        tokenizer: Decodes the answers.
        buckets: The static sizes that prompts are padded to.
        settings: The tokens that end an answer, and what changes the logits.
        stop_ids: Each of these tokens ends an answer: those of the settings, otherwise those of the model's chat
            format, otherwise those of ChatML.
        pad_id: The token that follows the end of an answer.
        prefill_program: The jitted prefill; see `Programs.prefill`. Planning compiles it without arrays.
        decode_program: The jitted decode loop; see `Programs.decode`.
        compilations: How often each program was traced; see `Programs.compilations`.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        tokenizer: Any,
        buckets: Buckets | None = None,
        *,
        settings: GenerationSettings | None = None,
        ignore_stop: bool = False,
        unstack: bool = True,
    ):
        """Prepares generation; nothing is compiled before the first prompt.

        Args:
            model: The model. Its parameters may be sharded.
            tokenizer: A Hugging Face tokenizer with the end tokens of the model's chat format.
            buckets: The static sizes that prompts are padded to; by default `Buckets.of` the model. With a pruner they
                are also the sizes of what is left of the prompts in each stage of the decoder.
            settings: The tokens that end a reply, and what changes the logits; by default those that end a reply in the
                model's chat format, and nothing.
            ignore_stop: Whether answers go on to `max_new_tokens` whatever is generated, which measurements of speed
                need. The programs are the same.
            unstack: Whether one CPU, and no other device, may keep a second copy of the decoder's layers, in the form
                in which it decodes faster (`vr_jax.inference.unstacked`).

        Raises:
            UserError: The tokenizer has no stop token.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.buckets = buckets or Buckets.of(model.config)
        self.settings = settings or GenerationSettings()
        vocabulary = tokenizer.get_vocab()
        ends = _end_tokens(model.config.template, tokenizer)
        of_format = tuple(vocabulary[name] for name in ends if name in vocabulary)
        named = of_format or tuple(vocabulary[name] for name in STOP_TOKENS if name in vocabulary)
        stop_ids = self.settings.eos_token_ids or named
        if not stop_ids:
            raise UserError(
                f"the tokenizer has none of the stop tokens {', '.join(dict.fromkeys((*ends, *STOP_TOKENS)))}, and no "
                "generation_config.json gives an eos_token_id"
            )
        self.pad_id: int = (named or stop_ids)[-1]
        # No token has a negative id.
        self.stop_ids = tuple(-1 - index for index in range(len(stop_ids))) if ignore_stop else stop_ids
        programs = Programs(model.config, self.stop_ids, self.pad_id, self.settings, unstack=unstack)
        self.prefill_program = programs.prefill
        self.decode_program = programs.decode
        self.compilations = programs.compilations
        self._unstacks = programs.unstacks

    def with_model(self, model: VisionLanguageModel) -> Generator:
        """Returns a generator that answers with other parameters of the same model and shares the compiled programs.

        No array is copied: the programs take the parameters as they lie on the devices. So the parameters must not be
        donated to another program as long as the generator is used.

        Args:
            model: The model, whose config is that of this generator's.

        Raises:
            ValueError: The config is another one.
        """
        if model.config != self.model.config:
            raise ValueError("the model has another config than the one that the programs of the generator are for")
        other = copy.copy(self)
        other.model = model
        other.__dict__.pop("_decoding_model", None)
        return other

    def generate(
        self,
        prompts: Sequence[Example],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        rows: int | None = None,
    ) -> list[Reply]:
        """Answers prompts of any lengths and numbers of images.

        With several processes, each process gives its own prompts and gets its own replies.

        Args:
            prompts: What `Processor.prompt` returns.
            max_new_tokens: The longest answer, in tokens.
            sampling: How the next token is chosen; by default greedily.
            rows: The static number of rows of this process, at least `len(prompts)`, which is the default. Missing rows
                are padding.

        Returns:
            The replies in the order of the prompts.

        Raises:
            PromptTooLong: A prompt is larger than the largest bucket.
            UserError: `max_new_tokens` is not positive, or there are more prompts than rows.
        """
        first = jax.process_index() * (rows or len(prompts))
        numbered = dict(enumerate(prompts, start=first))
        replies = self.generate_rows(
            numbered, max_new_tokens=max_new_tokens, sampling=sampling, rows=rows or len(prompts)
        )
        return [replies[number] for number in numbered]

    def generate_rows(
        self,
        prompts: Mapping[int, Example],
        *,
        max_new_tokens: int,
        rows: int,
        sampling: Sampling | None = None,
    ) -> dict[int, Reply]:
        """Answers numbered prompts; every process gets the replies of all processes.

        The random draws of a row depend on the seed and the row's number alone.

        Args:
            prompts: Prompts by number. Numbers are not negative and differ between all processes.
            max_new_tokens: The longest answer, in tokens.
            rows: The static number of rows of this process.
            sampling: How the next token is chosen; by default greedily.

        Returns:
            The replies by number.

        Raises:
            PromptTooLong: A prompt is larger than the largest bucket.
            UserError: `max_new_tokens` is not positive, or there are more prompts than rows.
        """
        sampling = sampling or Sampling()
        state = self.prefill(self.batch(prompts, rows), max_new_tokens, sampling)
        return self.replies(self.decode(state, max_new_tokens, sampling))

    def stream(
        self, prompt: Example, *, max_new_tokens: int, sampling: Sampling | None = None, chunk: int = 4
    ) -> Iterator[str]:
        """Yields the texts of `pieces` that are not empty. Joined, they are the text that `generate` returns.

        The arguments and errors are those of `pieces`.
        """
        for piece in self.pieces(prompt, max_new_tokens=max_new_tokens, sampling=sampling, chunk=chunk):
            if piece.text:
                yield piece.text

    def pieces(
        self, prompt: Example, *, max_new_tokens: int, sampling: Sampling | None = None, chunk: int = 4
    ) -> Iterator[Piece]:
        """Yields one answer piece by piece, as it is decoded.

        The first piece comes as soon as the first token is known, and a further one after each `chunk` tokens. The last
        one says why the answer ended.

        Args:
            prompt: What `Processor.prompt` returns.
            max_new_tokens: The longest answer, in tokens.
            sampling: How the next token is chosen; by default greedily.
            chunk: The number of tokens to decode before the next piece.

        Raises:
            PromptTooLong: The prompt is larger than the largest bucket.
            UserError: `max_new_tokens` or `chunk` is not positive.
        """
        if chunk < 1:
            raise UserError(f"chunk = {chunk}: expected at least 1 token")
        sampling = sampling or Sampling()
        text = TextStream(self.tokenizer)
        state = self.prefill(self.batch({0: prompt}, 1), max_new_tokens, sampling)
        shown, step, done = 0, 1, False
        while True:
            tokens, stopped = self._until_stop(np.asarray(state.tokens)[0, :step])
            new, shown = text.push(tokens[shown:]), len(tokens)
            if stopped or done or step >= max_new_tokens:
                yield Piece(new + text.finish(), shown, "stop" if stopped else "length")
                return
            yield Piece(new, shown)
            until = min(step + chunk, max_new_tokens)
            state = self.decode(state, until, sampling)
            step, done = int(state.step), bool(np.all(state.done))

    def batch(self, prompts: Mapping[int, Example], rows: int) -> PromptBatch:
        """Puts numbered prompts into the smallest buckets that hold those of all processes.

        Args:
            prompts: Prompts by number.
            rows: The static number of rows of this process.

        Raises:
            PromptTooLong: A prompt is larger than the largest bucket.
            UserError: There are more prompts than rows.
        """
        if len(prompts) > rows:
            raise UserError(f"{len(prompts)} prompts for {rows} rows")
        config = self.model.config
        sizes = [(len(p.tokens), len(p.tile_pixels), *self.kept(p)) for p in prompts.values()]
        largest = np.max([*sizes, (1, 1, *[1] * len(self._pruned_stages()))], axis=0)
        if jax.process_count() > 1:
            largest = multihost_utils.process_allgather(largest).max(axis=0)
        needed, tiles, *kept = largest.tolist()
        tokens, tiles = self.buckets.fit(needed, tiles)
        lengths = tuple(min(tokens, self.buckets.fit_tokens(length)) for length in kept) or None
        shape = BatchShape(rows=rows, tokens=tokens, tiles=tiles, tile_size=config.image.tile_size)
        host = collate([[p] for p in prompts.values()], shape, pad_side="left", optional=config.batch_fields)
        numbers = np.full(rows, -1, np.int32)
        numbers[: len(prompts)] = list(prompts)
        return PromptBatch(host.batch, numbers, lengths)

    def prefill(self, prompts: PromptBatch, max_new_tokens: int, sampling: Sampling | None = None) -> DecodeState:
        """Generates the first token of every row and makes room for the others.

        Raises:
            UserError: `max_new_tokens` is not positive.
        """
        arrays, static = self._prefill_arguments(prompts, max_new_tokens, sampling or Sampling())
        return self.prefill_program(*arrays, **static)

    def decode(self, state: DecodeState, until: int, sampling: Sampling | None = None) -> DecodeState:
        """Generates until `until` tokens exist or every row has stopped. The state is donated."""
        return self.decode_program(self._decoding_model, state, until, *_traced(sampling or Sampling()))

    def replies(self, state: DecodeState) -> dict[int, Reply]:
        """Returns the answers of all processes by the numbers of their prompts."""
        return {
            int(row): self._reply(tokens)
            for row, tokens in zip(np.asarray(state.row), np.asarray(state.tokens), strict=True)
            if row >= 0
        }

    def programs(self, prompts: PromptBatch, max_new_tokens: int) -> dict[str, Program]:
        """Compiles what `prefill` and `decode` run greedily for such a batch, and keeps it for them.

        Returns:
            The programs "prefill" and "decode".
        """
        arrays, static = self._prefill_arguments(prompts, max_new_tokens, Sampling())
        prefill = self.prefill_program.lower(*arrays, **static)
        state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), prefill.out_info)
        decoding = (self._decoding_model, state, max_new_tokens, *_traced(Sampling()))
        return {
            "prefill": Program(prefill.compile(), _bytes(arrays)),
            "decode": Program(self.decode_program.lower(*decoding).compile(), _bytes(decoding)),
        }

    def kept(self, prompt: Example) -> list[int]:
        """Returns how many tokens of a prompt each stage of a pruned decoder sees; without a pruner, an empty list."""
        config, cells = self.model.config, prompt.vision_cell
        if config.pruning is None:
            return []
        size = PromptSize(
            text=int(np.sum(cells == NO_CELL)),
            cells=int(np.sum(cells >= 0)),
            newlines=int(np.sum(cells == NEWLINE)),
            tiles=len(prompt.tile_pixels),
        )
        return [config.pruning.kept(config.spec, layer, size) for layer in self._pruned_stages()]

    @functools.cached_property
    def _decoding_model(self) -> VisionLanguageModel:
        """The model in the form that decodes fastest, which on one CPU is a second copy of the decoder's layers."""
        return unstacked_model(self.model) if self._unstacks() else self.model

    def _prefill_arguments(
        self, prompts: PromptBatch, new_tokens: int, sampling: Sampling
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if new_tokens < 1:
            raise UserError(f"max_new_tokens = {new_tokens}: expected at least 1")
        batch, numbers = on_devices(prompts)
        arrays = (self.model, batch, numbers, np.uint32(sampling.seed), *_traced(sampling))
        return arrays, {"new_tokens": new_tokens, "lengths": prompts.lengths}

    def _pruned_stages(self) -> tuple[int, ...]:
        """The first layer of every stage of a decoder with a pruner."""
        config = self.model.config
        return config.decoder_bounds[:-1] if config.pruning else ()

    def _until_stop(self, tokens: Int[np.ndarray, " m"]) -> tuple[list[int], bool]:
        """The tokens before the first stop token, and whether there is one."""
        stops = np.flatnonzero(np.isin(tokens, self.stop_ids))
        return (tokens[: stops[0]] if stops.size else tokens).tolist(), bool(stops.size)

    def _reply(self, tokens: Int[np.ndarray, " m"]) -> Reply:
        kept, stopped = self._until_stop(tokens)
        return Reply(decode_text(self.tokenizer, kept), tuple(kept), "stop" if stopped else "length")


def _end_tokens(template: Template, tokenizer: Any) -> tuple[str, ...]:
    """Returns the tokens that end a reply in a chat format; none where the tokenizer has no template of its own."""
    try:
        return chat_format(template, tokenizer).end_tokens
    except UserError:
        return ()


def _bytes(tree: Any) -> int:
    return sum(np.size(leaf) * jnp.result_type(leaf).itemsize for leaf in jax.tree.leaves(tree))


def _traced(sampling: Sampling) -> tuple[np.float32, np.float32] | tuple[None, None]:
    """The temperature and top_p as `sample` takes them: None where decoding is greedy."""
    return (np.float32(sampling.temperature), np.float32(sampling.top_p)) if sampling.temperature else (None, None)
