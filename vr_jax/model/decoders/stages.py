"""The interface between a decoder and the rest of the model: inputs, stages, hooks and caches.

A decoder runs its layers in stages. Stage k is one `lax.scan` over stacked layers; a stage hook may act before each
stage and change the length of the rows. The decoder itself knows nothing of images
(docs/design/decisions.md#decision-1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vr_jax.kernels.attention import cached_attention
from vr_jax.pytree import array_dataclass


@array_dataclass
class DecoderInputs:
    """The packed rows on their way through the stages.

    Attributes:
        hidden: Hidden states.
        positions: Rotary positions.
        segment_ids: Numbers 1.. of the samples of a row; 0 is padding.
        grid_positions: The row and column axis of multi-axis rotary positions; see `Batch.grid_positions`.
    """

    hidden: Float[Array, "B N D"]
    positions: Int[Array, "B N"]
    segment_ids: Int[Array, "B N"]
    grid_positions: Int[Array, "B N 2"] | None = None

    def replace(self, **changes: Any) -> DecoderInputs:
        """A copy with some fields replaced."""
        return dataclasses.replace(self, **changes)


@array_dataclass
class StageCache:
    """Keys and values of one stage's L layers.

    Slots are filled from the left. Rows share the next free slot because prompts are right-aligned. Stages may have
    different lengths where a pruner acts. Heads come before slots, so that what one head attends to lies together.

    Attributes:
        keys: Keys of all layers.
        values: Values of all layers.
        valid: The slots that a new token may attend to.
        next: The first free slot.
        shift: How far the positions in this stage lie below those of the prompt, after a pruner that renumbers.
    """

    keys: Float[Array, "L B G S K"]
    values: Float[Array, "L B G S K"]
    valid: Bool[Array, "B S"]
    next: Int[Array, ""]
    shift: Int[Array, " B"]


KVCache = tuple[StageCache, ...]
# Cosine and sine of the rotary angles.
Rotary = tuple[Float[Array, "B N 1 K"], Float[Array, "B N 1 K"]]


def write_slot(
    slots: Float[Array, "*L B G S K"],
    new: Float[Array, "B 1 G K"],
    slot: Int[Array, ""],
    layer: Int[Array, ""] | None = None,
) -> Float[Array, "*L B G S K"]:
    """Writes the key or value of one new token per row.

    Args:
        slots: The cache of one layer, or of all layers of a stage.
        new: The keys or values.
        slot: The slot to fill.
        layer: The layer to write, where `slots` are those of all layers.

    Returns:
        The cache with that slot replaced.
    """
    update = new.swapaxes(1, 2)
    if layer is None:
        return jax.lax.dynamic_update_slice(slots, update, (0, 0, slot, 0))
    return jax.lax.dynamic_update_slice(slots, update[None], (layer, 0, 0, slot, 0))


@array_dataclass
class HiddenStates:
    """Hidden states at M selected positions between the layers, before the final norm.

    Attributes:
        after: The output of each chosen layer by its number, counted from 1, before a stage hook acts on it.
        resumed: What a stage hook makes of the output of a layer, by the number of that layer.
        hook_state: The state of the stage hook after its last call; None without a hook.
    """

    after: dict[int, Float[Array, "B M D"]]
    resumed: dict[int, Float[Array, "B M D"]]
    hook_state: Any = None


@dataclass(frozen=True)
class StageHook[State]:
    """A function that acts on the decoder inputs before each stage, and the state that it carries from stage to stage.

    The decoder calls `apply` with k = 0, 1, ... before stage k, and with the number of stages before the final norm,
    each time with the state that the call before returned. So the function itself keeps nothing between calls. A hook
    belongs to one forward pass: `apply` may hold arrays of its batch.

    Attributes:
        apply: Maps (k, decoder inputs, state) to the inputs of stage k and the next state. It may change the length of
            the rows, which stay aligned to the right; before the final norm it may not.
        state: The first state, a pytree; None for a hook that carries nothing.
    """

    apply: Callable[[int, DecoderInputs, State], tuple[DecoderInputs, State]]
    state: State


class DecodeStage(Protocol):
    """A function that runs the layers of one stage for one new token per row.

    A layer of any decoder is called as layer(hidden, rotary, attend), where attend maps (query, key, value) to the
    result of the attention and the written cache; it returns the hidden states and that cache.
    """

    def __call__(
        self, stage: Any, hidden: Float[Array, "B 1 D"], rotary: Rotary, cache: Any
    ) -> tuple[Float[Array, "B 1 D"], Any]:
        """Runs one stage.

        Args:
            stage: An element of `DecoderModule.stages`.
            hidden: The hidden states of the new tokens.
            rotary: Cosine and sine of their rotary angles.
            cache: The cache of the stage.

        Returns:
            The hidden states after the stage, and the cache with the new keys and values.
        """
        ...


def scan_stage(
    stage: Any, hidden: Float[Array, "B 1 D"], rotary: Rotary, cache: StageCache
) -> tuple[Float[Array, "B 1 D"], StageCache]:
    """Decodes one token per row by a scan over the stacked layers of a stage; see `DecodeStage`.

    A layer is called with hidden states, rotary angles and a function that attends, and returns hidden states and what
    that function wrote.
    """
    valid = cache.valid.at[:, cache.next].set(True)

    def body(
        carry: tuple[Array, Array, Array], layer_and_index: tuple[Any, Array]
    ) -> tuple[tuple[Array, Array, Array], None]:
        # The cache is carried and not scanned over, so that each step writes one slot in place.
        x, keys, values = carry
        layer, index = layer_and_index

        def attend(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, Array]]:
            written = write_slot(keys, k, cache.next, index), write_slot(values, v, cache.next, index)
            return cached_attention(q, written[0][index], written[1][index], valid), written

        x, (keys, values) = layer(x, rotary, attend)
        return (x, keys, values), None

    layers = jnp.arange(len(cache.keys))
    (hidden, keys, values), _ = jax.lax.scan(body, (hidden, cache.keys, cache.values), (stage, layers))
    return hidden, dataclasses.replace(cache, keys=keys, values=values, valid=valid, next=cache.next + 1)


@runtime_checkable
class DecoderModule(Protocol):
    """The interface of a decoder's module.

    A `DecoderConfig` builds it.
    """

    @property
    def stages(self) -> Sequence[Any]:
        """The layers of each stage: one layer module whose parameters have a leading layer axis."""
        ...

    @property
    def bounds(self) -> tuple[int, ...]:
        """Stage k holds the layers bounds[k] .. bounds[k + 1] - 1."""
        ...

    @property
    def embed(self) -> Callable[[Int[Array, "B N"]], Float[Array, "B N D"]]:
        """The function from tokens to their embeddings."""
        ...

    def init_cache(self, rows: int, length: int | Sequence[int]) -> KVCache:
        """Empty caches.

        Args:
            rows: Number of rows.
            length: Slots per row, prompt and new tokens together: one number, or one for each stage.
        """
        ...

    def __call__(
        self, inputs: DecoderInputs, cache: KVCache | None = None, stage_hook: StageHook[Any] | None = None
    ) -> tuple[Float[Array, "B N D"], KVCache | None]:
        """Runs whole rows, for training or for the prefill of generation.

        Args:
            inputs: The rows.
            cache: Empty caches to fill, or None.
            stage_hook: The hook that acts before each stage and before the final norm, or None.

        Returns:
            The hidden states after the final norm, and the filled caches or None. The length of the rows is that which
            the stage hook leaves.
        """
        ...

    def hidden_states(
        self,
        inputs: DecoderInputs,
        layers: Sequence[int],
        stage_hook: StageHook[Any] | None = None,
        select: Callable[[Float[Array, "B N D"]], Float[Array, "B M D"]] = lambda hidden: hidden,
    ) -> HiddenStates:
        """Hidden states of whole rows between the layers. Layers after the last chosen one do not run.

        Args:
            inputs: The rows.
            layers: Numbers of layers, counted from 1 and strictly increasing. They need not be bounds of stages.
            stage_hook: The hook that acts before each stage; it must keep the length of the rows.
            select: Takes M positions from N.

        Raises:
            ValueError: A layer does not exist, or the numbers do not increase.
        """
        ...

    def last_token_attention(self, stage: int, inputs: DecoderInputs) -> Float[Array, "B N"]:
        """The attention weights of each row's last token in the first layer of a stage, averaged over the query heads.

        Args:
            stage: Number of the stage, which has not run yet.
            inputs: Its inputs, one segment per row.

        Returns:
            float32; a row sums to one, and padding has 0.
        """
        ...

    def decode(
        self,
        hidden: Float[Array, "B 1 D"],
        positions: Int[Array, "B 1"],
        cache: Sequence[Any],
        decode_stage: DecodeStage | None = None,
    ) -> tuple[Float[Array, "B 1 D"], tuple[Any, ...]]:
        """Runs one new token per row through the caches. Stage hooks do not act here.

        Args:
            hidden: Embeddings of the tokens.
            positions: Their positions, which continue those of the prompts.
            cache: The caches of all stages.
            decode_stage: What runs a stage, in place of the decoder's own scan over stacked layers; `cache` and
                `stages` then have the form that it takes.

        Returns:
            The hidden states after the final norm, and the caches with the tokens.
        """
        ...

    def head_kernel(self) -> Float[Array, "D V"]:
        """The output matrix, which is the embedding's transpose where the two are tied."""
        ...

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """The vocabulary logits of normed hidden states, float32."""
        ...
