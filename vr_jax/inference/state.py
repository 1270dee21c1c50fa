"""What generation passes around: batches of prompts, the state of decoding, and how both lie on the devices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.tree_util import GetAttrKey
from jaxtyping import Array, Bool, Int, Key

from vr_jax.errors import UserError
from vr_jax.inference.unstacked import UnstackedCache
from vr_jax.model.batch import Batch
from vr_jax.model.decoders.stages import KVCache
from vr_jax.pytree import array_dataclass
from vr_jax.sharding import batch_sharding, batch_shards, replicated


@dataclass(frozen=True)
class Reply:
    """An answer of the model.

    Attributes:
        text: The decoded text.
        tokens: The generated tokens without the stop token.
        finish: "stop" if a stop token ended the answer, "length" if the limit did.
    """

    text: str
    tokens: tuple[int, ...]
    finish: Literal["stop", "length"]


@dataclass(frozen=True)
class PromptBatch:
    """Right-aligned prompts as host arrays of static shape.

    Attributes:
        batch: The rows, one prompt each.
        numbers: The caller's number of each row; -1 marks a row without a prompt.
        lengths: The row length of every decoder stage if the model has a pruner, else None.
    """

    batch: Batch
    numbers: Int[np.ndarray, " B"]
    lengths: tuple[int, ...] | None


@array_dataclass
class DecodeState:
    """Everything that a decode step needs, for B rows with room for M new tokens. Each step donates it to the next.

    Attributes:
        cache: Keys and values of every decoder stage.
        tokens: The tokens generated so far. The pad id follows a row's stop token.
        positions: The rotary position of each row's next token.
        done: Whether a row has stopped, or has no prompt.
        step: The number of tokens generated.
        row: The caller's number of each row.
        keys: The key of each row's random draws.
        occurred: Whether a token of the vocabulary occurred, which a repetition penalty acts on; None without one.
    """

    cache: KVCache | tuple[UnstackedCache, ...]
    tokens: Int[Array, "B M"]
    positions: Int[Array, " B"]
    done: Bool[Array, " B"]
    step: Int[Array, ""]
    row: Int[Array, " B"]
    keys: Key[Array, " B"]
    occurred: Bool[Array, "B V"] | None = None


# The logical axes of the arrays of a state, and of those of a stage's cache beside its keys and values.
_STATE_AXES: dict[str, tuple[str | None, ...]] = {
    "tokens": (None, None),
    "positions": (None,),
    "done": (None,),
    "step": (),
    "row": (None,),
    "keys": (None,),
    "occurred": ("batch", None),
}
_CACHE_AXES: dict[str, tuple[str | None, ...]] = {"valid": ("batch", None), "next": (), "shift": ("batch",)}


def lay_out(state: DecodeState, place: Callable[..., Any]) -> DecodeState:
    """Applies a function to every array of a state, with the array's logical axes.

    Every state has the same sharding, so that the decode loop compiles once. Small arrays are whole on every device, so
    that each process can read all rows.

    Args:
        state: The state; its leaves may be arrays or their shapes.
        place: Called as `place(array, *names)` with the name of each axis, or None.

    Returns:
        The state of what `place` returned.
    """

    def placed(path: tuple[Any, ...], leaf: Any) -> Any:
        names = [key.name for key in path if isinstance(key, GetAttrKey)]
        if names[0] != "cache":
            return place(leaf, *_STATE_AXES[names[0]])
        if names[1] in ("keys", "values"):
            layers = (None,) * (leaf.ndim - 4)  # stacked layers have an axis of their own
            return place(leaf, *layers, "batch", "kv_heads", None, None)
        return place(leaf, *_CACHE_AXES[names[1]])

    return jax.tree_util.tree_map_with_path(placed, state)


def on_devices(prompts: PromptBatch) -> tuple[Batch, Int[Array, " B"]]:
    """Moves the rows of this process and their numbers to the devices.

    Under `jax.set_mesh` the rows are sharded over the data axes of the mesh where their number divides, and are whole
    on every device where it does not.

    Returns:
        The global batch and the global row numbers.

    Raises:
        UserError: The rows of several processes do not divide over the mesh.
    """
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
        raise UserError(
            f"{rows} rows do not divide over the mesh's {batch_shards(mesh)} data shards; with several processes "
            f"the batch size must be a multiple of {batch_shards(mesh)}"
        )
    return replicated(mesh)
