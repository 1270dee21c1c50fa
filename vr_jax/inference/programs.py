"""The two compiled programs of generation: prefill, and the decode loop with a static cache."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from vr_jax.compilation import compiler_options
from vr_jax.inference.processors import occurred_in_prompt, process_logits, with_token
from vr_jax.inference.sampling import sample
from vr_jax.inference.state import DecodeState, lay_out
from vr_jax.inference.unstacked import UnstackedCache, decode_unstacked, unstacked_cache, unstacks
from vr_jax.model.batch import Batch
from vr_jax.model.config import VlmConfig
from vr_jax.model.vlm import VisionLanguageModel
from vr_jax.model_directory import GenerationSettings
from vr_jax.sharding import constrain

# A program's name, rows, tokens, tiles, new tokens, and the lengths of a pruned decoder's stages.
ProgramKey = tuple[str, int, int, int, int, *tuple[int, ...]]


class Programs:
    """The jitted functions that generate.

    Attributes:
        stop_ids: Each of these tokens ends a row.
        pad_id: The token that follows a row's stop token.
        settings: What changes the logits before a token is chosen.
        prefill: Reads the prompts and generates the first token: (model, batch, row numbers, seed, temperature, top_p)
            and the static `new_tokens` and `lengths` give a `DecodeState`.
        decode: Generates further tokens: (model, state, until, temperature, top_p) give the next state. The state is
            donated.
        compilations: How often each program was traced. The name is "prefill" or "decode", followed by ", sampled" at a
            temperature above 0. A count is at most 1 as long as the mesh stays the same.
    """

    def __init__(
        self,
        config: VlmConfig,
        stop_ids: tuple[int, ...],
        pad_id: int,
        settings: GenerationSettings | None = None,
        *,
        unstack: bool = True,
    ):
        """Makes the programs of a model; nothing is compiled before they are called."""
        self._unstack = unstack
        self.stop_ids = stop_ids
        self.pad_id = pad_id
        self.settings = settings or GenerationSettings()
        self.compilations: Counter[ProgramKey] = Counter()
        options = compiler_options(config.dtype)
        static = ("new_tokens", "lengths")
        self.prefill = jax.jit(self._prefill, static_argnames=static, compiler_options=options)
        self.decode = jax.jit(self._decode, donate_argnames="state", compiler_options=options)

    def unstacks(self) -> bool:
        """Returns whether the decode program takes a model whose layers are arrays of their own."""
        return self._unstack and unstacks()

    def _prefill(
        self,
        model: VisionLanguageModel,
        batch: Batch,
        row: Int[Array, " B"],
        seed: UInt[Array, ""],
        temperature: Float[Array, ""] | None,
        top_p: Float[Array, ""] | None,
        *,
        new_tokens: int,
        lengths: tuple[int, ...] | None,
    ) -> DecodeState:
        """Fills the cache with the prompts and generates the first token of every row."""
        rows, length = batch.tokens.shape
        tiles, name = batch.tile_segment.shape[1], _named("prefill", temperature)
        self.compilations[name, rows, length, tiles, new_tokens, *(lengths or ())] += 1
        slots = length + new_tokens if lengths is None else [length + new_tokens for length in lengths]
        hidden, filled = model(batch, model.init_cache(rows, slots), lengths)
        assert filled is not None
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), row)
        occurred = None
        if self.settings.repetition_penalty != 1.0:
            occurred = occurred_in_prompt(batch, model.config.decoder.vocab_size, model.config.image_token_id)
        state = DecodeState(
            cache=unstacked_cache(filled) if self.unstacks() else filled,
            tokens=jnp.full((rows, new_tokens), self.pad_id, jnp.int32),
            positions=batch.positions[:, -1] + 1,
            # Prompts are right-aligned: a row whose last slot is empty has no prompt and must not delay the others.
            done=batch.segment_ids[:, -1] == 0,
            step=jnp.zeros((), jnp.int32),
            row=row,
            keys=keys,
            occurred=occurred,
        )
        return self._append(state, model.logits(hidden[:, -1]), temperature, top_p)

    def _decode(
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

        # The sharding constraints inside the loop do not reach its result.
        return lay_out(jax.lax.while_loop(unfinished, body, state), constrain)

    def _append(
        self,
        state: DecodeState,
        logits: Float[Array, "B V"],
        temperature: Float[Array, ""] | None,
        top_p: Float[Array, ""] | None,
    ) -> DecodeState:
        """Draws the next token of every row and appends it."""
        keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.step)
        # The logits are first sharded as the rows of the output table are. Otherwise every chip would gather the whole
        # table to compute whole logits.
        logits = constrain(constrain(logits, "batch", "vocab"), "batch", None)
        logits = process_logits(logits, self.settings, self.stop_ids, state.step, state.occurred)
        token = sample(logits, keys, temperature, top_p)
        token = jnp.where(state.done, self.pad_id, token)
        occurred = None if state.occurred is None else with_token(state.occurred, token)
        done = state.done | jnp.isin(token, jnp.asarray(self.stop_ids))
        tokens = jax.lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], state.step, axis=1)
        after = dataclasses.replace(state, tokens=tokens, done=done, step=state.step + 1, occurred=occurred)
        return lay_out(after, constrain)


def _named(program: str, temperature: Float[Array, ""] | None) -> str:
    return program if temperature is None else f"{program}, sampled"
