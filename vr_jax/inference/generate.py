"""Batched generation: one compiled prefill per length bucket, one decode loop with a static cache."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int, Key

from vr_jax.compilation import compiler_options
from vr_jax.data.collate import collate
from vr_jax.data.types import Example
from vr_jax.inference.buckets import Buckets
from vr_jax.inference.sampling import Sampling, sample
from vr_jax.inference.streaming import TextStream, decode_text
from vr_jax.inference.unstacked import (
    UnstackedCache,
    decode_unstacked,
    unstacked_cache,
    unstacked_model,
    unstacks,
)
from vr_jax.model.batch import NEWLINE, NO_CELL, Batch, BatchShape
from vr_jax.model.decoders.stages import KVCache, StageCache
from vr_jax.model.registry import PromptSize
from vr_jax.model.vlm import VisionLanguageModel
from vr_jax.pytree import array_dataclass
from vr_jax.sharding import batch_sharding, batch_shards, constrain, replicated

STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")


class GenerationError(ValueError):
    """A request that cannot be generated; one line for the user."""


@dataclass(frozen=True)
class Reply:
    """What the model answered. `tokens` leave out the stop token; `finish` is "stop" if there was one, "length" if the
    limit came first."""

    text: str
    tokens: tuple[int, ...]
    finish: Literal["stop", "length"]


@dataclass(frozen=True)
class PromptBatch:
    """Prompts as host arrays of static shape, right-aligned. `numbers`: the caller's number of each row, -1 without a
    prompt. `lengths`: with a pruner, the row length of every decoder stage."""

    batch: Batch
    numbers: Int[np.ndarray, " B"]
    lengths: tuple[int, ...] | None


@array_dataclass
class DecodeState:
    """Everything one decode step needs; B rows, room for M new tokens. Donated from step to step."""

    cache: KVCache | tuple[UnstackedCache, ...]
    tokens: Int[Array, "B M"]  # generated so far; after a row's stop token, the pad id
    positions: Int[Array, " B"]  # rotary position of the next token
    done: Bool[Array, " B"]
    step: Int[Array, ""]  # tokens generated
    row: Int[Array, " B"]  # the caller's number of each row
    keys: Key[Array, " B"]


@dataclass(frozen=True)
class Program:
    """A compiled program. `argument_bytes` are those of everything passed to it, read by it or not: all of it stays on
    the devices while it runs."""

    compiled: jax.stages.Compiled
    argument_bytes: int


class Generator:
    """Answers prompts in batches. Under `jax.set_mesh(mesh)` rows are sharded over ('replica', 'fsdp') where their
    number divides; parameters stay as they are sharded.

    model: its parameters may be sharded. tokenizer: a Hugging Face tokenizer with ChatML's stop tokens.
    buckets: the static prompt sizes; with a pruner also of what is left of the prompts in each stage of the decoder.
    ignore_stop: nothing ends a reply before `max_new_tokens`, through the same programs: for measuring speed.
    `compilations` counts what was traced, by (what, rows, tokens, tiles, new tokens, lengths of a pruned decoder's
    stages): each is at most 1 as long as the mesh stays the same. What: "prefill" or "decode", greedy or ", sampled".
    `prefill_program` and `decode_program` are the jitted functions that run, for whoever compiles them without arrays.

    Raises GenerationError for a tokenizer without a stop token."""

    def __init__(
        self, model: VisionLanguageModel, tokenizer: Any, buckets: Buckets | None = None, *, ignore_stop: bool = False
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.buckets = buckets or Buckets()
        self.compilations: Counter[tuple[str, int, int, int, int, *tuple[int, ...]]] = Counter()
        vocabulary = tokenizer.get_vocab()
        self.stop_ids = tuple(vocabulary[name] for name in STOP_TOKENS if name in vocabulary)
        if not self.stop_ids:
            raise GenerationError(f"the tokenizer has none of the stop tokens {list(STOP_TOKENS)}")
        self.pad_id = self.stop_ids[-1]
        if ignore_stop:
            self.stop_ids = tuple(-1 - index for index in range(len(self.stop_ids)))  # which no token has
        options = compiler_options(model.config.dtype)
        self.prefill_program = jax.jit(
            self._prefill_rows, static_argnames=("new_tokens", "lengths"), compiler_options=options
        )
        self.decode_program = jax.jit(self._decode_loop, donate_argnames="state", compiler_options=options)

    def generate(
        self,
        prompts: Sequence[Example],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        rows: int | None = None,
    ) -> list[Reply]:
        """Replies in the order of `prompts` (of any lengths and numbers of images; see `Processor.prompt`).

        rows: the static number of rows, at least len(prompts); missing rows are padding. With several processes, each
        gives its own prompts and gets its own replies; `rows` counts the rows of one process.
        Raises PromptTooLong for a prompt beyond the buckets."""
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
        """As `generate`, but prompts carry numbers (>= 0, different on every process), and every process gets the
        replies of all processes by number. A row's random draws depend on the seed and its number alone."""
        sampling = sampling or Sampling()
        state = self.prefill(self.batch(prompts, rows), max_new_tokens, sampling)
        return self.replies(self.decode(state, max_new_tokens, sampling))

    def stream(
        self, prompt: Example, *, max_new_tokens: int, sampling: Sampling | None = None, chunk: int = 4
    ) -> Iterator[str]:
        """Pieces of one reply as they are decoded, `chunk` tokens at a time. A piece never ends inside a character;
        joined, the pieces are the text that `generate` gives.
        Raises ValueError for chunk < 1, PromptTooLong for a prompt beyond the buckets."""
        if chunk < 1:
            raise ValueError(f"chunk = {chunk}: expected at least 1 token")
        sampling = sampling or Sampling()
        text = TextStream(self.tokenizer)
        state = self.prefill(self.batch({0: prompt}, 1), max_new_tokens, sampling)
        shown, step, done = 0, 1, False
        while True:
            tokens, stopped = self._until_stop(np.asarray(state.tokens)[0, :step])
            piece = text.push(tokens[shown:])
            if piece:
                yield piece
            shown = len(tokens)
            if stopped or done or step >= max_new_tokens:
                break
            until = min(step + chunk, max_new_tokens)
            state = self.decode(state, until, sampling)
            step, done = int(state.step), bool(np.all(state.done))
        if rest := text.finish():
            yield rest

    # --- the steps of the above, for whoever measures them

    def batch(self, prompts: Mapping[int, Example], rows: int) -> PromptBatch:
        """Numbered prompts in the smallest buckets that hold them (of all processes). Raises PromptTooLong."""
        if len(prompts) > rows:
            raise GenerationError(f"{len(prompts)} prompts for {rows} rows")
        config = self.model.config
        sizes = [(len(p.tokens), len(p.tile_pixels), *self.kept(p)) for p in prompts.values()]
        largest = np.max([*sizes, (1, 1, *[1] * len(self._pruned_stages()))], axis=0)
        if jax.process_count() > 1:
            largest = multihost_utils.process_allgather(largest).max(axis=0)
        needed, tiles, *kept = largest.tolist()
        tokens, tiles = self.buckets.fit(needed, tiles)
        lengths = tuple(min(tokens, self.buckets.fit_tokens(length)) for length in kept) or None
        shape = BatchShape(rows=rows, tokens=tokens, tiles=tiles, tile_size=config.image.tile_size)
        host = collate(
            [[p] for p in prompts.values()], shape, pad_side="left", weighted_cells=config.image.may_interpolate
        )
        numbers = np.full(rows, -1, np.int32)
        numbers[: len(prompts)] = list(prompts)
        return PromptBatch(host.batch, numbers, lengths)

    def prefill(self, prompts: PromptBatch, max_new_tokens: int, sampling: Sampling | None = None) -> DecodeState:
        """The first token of every row, and room for the others."""
        arrays, static = self._prefill_arguments(prompts, max_new_tokens, sampling or Sampling())
        return self.prefill_program(*arrays, **static)

    def decode(self, state: DecodeState, until: int, sampling: Sampling | None = None) -> DecodeState:
        """Goes on until `until` tokens exist or every row has stopped. `state` is donated."""
        return self.decode_program(self._decoding_model, state, until, *_traced(sampling or Sampling()))

    def replies(self, state: DecodeState) -> dict[int, Reply]:
        """The finished rows of all processes by number."""
        return {
            int(row): self._reply(tokens)
            for row, tokens in zip(np.asarray(state.row), np.asarray(state.tokens), strict=True)
            if row >= 0
        }

    def programs(self, prompts: PromptBatch, max_new_tokens: int) -> dict[str, Program]:
        """Compiles what `prefill` and `decode` run for such a batch, and keeps it for them."""
        arrays, static = self._prefill_arguments(prompts, max_new_tokens, Sampling())
        prefill = self.prefill_program.lower(*arrays, **static)
        state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), prefill.out_info)
        decoding = (self._decoding_model, state, max_new_tokens, *_traced(Sampling()))
        return {
            "prefill": Program(prefill.compile(), _bytes(arrays)),
            "decode": Program(self.decode_program.lower(*decoding).compile(), _bytes(decoding)),
        }

    # --- host side

    @functools.cached_property
    def _decoding_model(self) -> VisionLanguageModel:
        """The model as decoding reads it. On one CPU that takes a second copy of the decoder's layers."""
        return unstacked_model(self.model) if unstacks() else self.model

    def _prefill_arguments(
        self, prompts: PromptBatch, new_tokens: int, sampling: Sampling
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if new_tokens < 1:
            raise GenerationError(f"max_new_tokens = {new_tokens}: expected at least 1")
        batch, numbers = on_devices(prompts)
        arrays = (self.model, batch, numbers, np.uint32(sampling.seed), *_traced(sampling))
        return arrays, {"new_tokens": new_tokens, "lengths": prompts.lengths}

    def _pruned_stages(self) -> tuple[int, ...]:
        """The first layer of every stage of a decoder with a pruner."""
        config = self.model.config
        return config.decoder_bounds[:-1] if config.pruning else ()

    def kept(self, prompt: Example) -> list[int]:
        """With a pruner, how many tokens of a prompt each stage of the decoder sees at most; else empty."""
        config, cells = self.model.config, prompt.vision_cell
        size = PromptSize(
            text=int(np.sum(cells == NO_CELL)),
            cells=int(np.sum(cells >= 0)),
            newlines=int(np.sum(cells == NEWLINE)),
            tiles=len(prompt.tile_pixels),
        )
        return [config.pruning.kept(config.spec, layer, size) for layer in self._pruned_stages()]  # type: ignore[union-attr]

    def _until_stop(self, tokens: Int[np.ndarray, " m"]) -> tuple[list[int], bool]:
        stops = np.flatnonzero(np.isin(tokens, self.stop_ids))
        return (tokens[: stops[0]] if stops.size else tokens).tolist(), bool(stops.size)

    def _reply(self, tokens: Int[np.ndarray, " m"]) -> Reply:
        kept, stopped = self._until_stop(tokens)
        return Reply(decode_text(self.tokenizer, kept), tuple(kept), "stop" if stopped else "length")

    # --- traced

    def _prefill_rows(
        self,
        model: VisionLanguageModel,
        batch: Batch,
        row: Int[Array, " B"],
        seed: Int[Array, ""],
        temperature: Float[Array, ""] | None,
        top_p: Float[Array, ""] | None,
        *,
        new_tokens: int,
        lengths: tuple[int, ...] | None,
    ) -> DecodeState:
        rows, length = batch.tokens.shape
        tiles, name = batch.tile_segment.shape[1], _named("prefill", temperature)
        self.compilations[name, rows, length, tiles, new_tokens, *(lengths or ())] += 1
        slots = length + new_tokens if lengths is None else [length + new_tokens for length in lengths]
        hidden, cache = model(batch, model.init_cache(rows, slots), lengths)
        assert cache is not None
        if unstacks():
            cache = unstacked_cache(cache)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), row)
        state = DecodeState(
            cache=cache,
            tokens=jnp.full((rows, new_tokens), self.pad_id, jnp.int32),
            positions=batch.positions[:, -1] + 1,
            # Prompts are right-aligned: a row whose last slot is empty has no prompt, and must not hold up the others.
            done=batch.segment_ids[:, -1] == 0,
            step=jnp.zeros((), jnp.int32),
            row=row,
            keys=keys,
        )
        return self._append(state, model.logits(hidden[:, -1]), temperature, top_p)

    def _decode_loop(
        self,
        model: VisionLanguageModel,
        state: DecodeState,
        until: Int[Array, ""],
        temperature: Float[Array, ""] | None,
        top_p: Float[Array, ""] | None,
    ) -> DecodeState:
        """Generates until `until` tokens exist or every row has stopped."""
        rows, new_tokens = state.tokens.shape
        lengths = [stage.valid.shape[1] - new_tokens for stage in state.cache]
        pruned = lengths if model.config.pruning else ()
        self.compilations[_named("decode", temperature), rows, lengths[0], 0, new_tokens, *pruned] += 1

        def unfinished(state: DecodeState) -> Bool[Array, ""]:
            return (state.step < until) & ~jnp.all(state.done)

        def body(state: DecodeState) -> DecodeState:
            newest = jax.lax.dynamic_slice_in_dim(state.tokens, state.step - 1, 1, axis=1)
            decode: Any = VisionLanguageModel.decode
            if isinstance(state.cache[0], UnstackedCache):
                decode = decode_unstacked
            hidden, cache = decode(model, newest, state.positions[:, None], state.cache)
            state = dataclasses.replace(state, cache=cache, positions=state.positions + 1)
            return self._append(state, model.logits(hidden[:, 0]), temperature, top_p)

        # The constraints inside the loop do not reach its result.
        return lay_out(jax.lax.while_loop(unfinished, body, state), constrain)

    def _append(
        self,
        state: DecodeState,
        logits: Float[Array, "B V"],
        temperature: Float[Array, ""] | None,
        top_p: Float[Array, ""] | None,
    ) -> DecodeState:
        keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.step)
        # First as the table's rows lie: else every chip would gather the table to make whole logits.
        logits = constrain(constrain(logits, "batch", "vocab"), "batch", None)
        token = sample(logits, keys, temperature, top_p)
        token = jnp.where(state.done, self.pad_id, token)
        done = state.done | jnp.isin(token, jnp.asarray(self.stop_ids))
        tokens = jax.lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], state.step, axis=1)
        return lay_out(dataclasses.replace(state, tokens=tokens, done=done, step=state.step + 1), constrain)


def lay_out(state: DecodeState, place: Callable[..., Any]) -> DecodeState:
    """`place(array, *logical axis names)` of every array. Every state is sharded alike, so that the loop compiles once;
    small arrays are whole on every device, so that each process can read all rows."""

    def slots(cached: Array) -> Array:
        layers = (None,) * (cached.ndim - 4)  # an axis where they are stacked
        return place(cached, *layers, "batch", "kv_heads", None, None)

    def stage(cache: StageCache | UnstackedCache) -> StageCache | UnstackedCache:
        return dataclasses.replace(
            cache,
            keys=jax.tree.map(slots, cache.keys),
            values=jax.tree.map(slots, cache.values),
            valid=place(cache.valid, "batch", None),
            next=place(cache.next),
            shift=place(cache.shift, "batch"),
        )

    return DecodeState(
        cache=tuple(stage(cache) for cache in state.cache),
        tokens=place(state.tokens, None, None),
        positions=place(state.positions, None),
        done=place(state.done, None),
        step=place(state.step),
        row=place(state.row, None),
        keys=place(state.keys, None),
    )


def _bytes(tree: Any) -> int:
    return sum(np.size(leaf) * jnp.result_type(leaf).itemsize for leaf in jax.tree.leaves(tree))


def _traced(sampling: Sampling) -> tuple[np.float32, np.float32] | tuple[None, None]:
    """temperature and top_p as `sample` takes them."""
    return (np.float32(sampling.temperature), np.float32(sampling.top_p)) if sampling.temperature else (None, None)


def _named(program: str, temperature: Float[Array, ""] | None) -> str:
    return program if temperature is None else f"{program}, sampled"


def on_devices(prompts: PromptBatch) -> tuple[Batch, Int[Array, " B"]]:
    """This process's rows and their numbers -> global arrays, rows sharded over the mesh in context if they divide."""
    tree, rows = (prompts.batch, prompts.numbers), len(prompts.numbers)
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jax.device_put(tree)
    sharding = _row_sharding(mesh, rows * jax.process_count())
    return jax.tree.map(lambda array: jax.make_array_from_process_local_data(sharding, array), tree)


def _row_sharding(mesh: Mesh, rows: int) -> NamedSharding:
    if rows % batch_shards(mesh) == 0:
        return batch_sharding(mesh)
    if jax.process_count() > 1:
        raise GenerationError(
            f"{rows} rows do not divide over the mesh's {batch_shards(mesh)} data shards; with several processes "
            f"the batch size must be a multiple of {batch_shards(mesh)}"
        )
    return replicated(mesh)
