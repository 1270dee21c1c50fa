"""Reads which chips talk to each other in a collective, in any of XLA's notations."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

import numpy as np

_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\] *\{([^}]*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTED = re.compile(r"replica_groups=\{\{([^}]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{} ]*\})\}")
_MEGASCALE = re.compile(r"_xla_megascale_target=\"?\{\{?([^}]*)\}")

# The transfers between slices that libtpu writes as a send and a receive.
_TRANSFER = re.compile(r'_xla_megascale_transfer_type="([A-Z_]+)"')
_KINDS = {
    "ALL_REDUCE": "all-reduce",
    "ALL_GATHER": "all-gather",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
}


def slice_transfer(attributes: str) -> tuple[str, int] | None:
    """Returns the kind of collective that a send or a receive of libtpu is part of, and its number of slices.

    libtpu cuts a collective over several slices into one within each slice and one between chips of different slices.
    The latter is a send of the operand to the host, which talks to the other hosts, and a receive of the result.

    Args:
        attributes: The attributes of the send.

    Returns:
        None for a transfer that stays on its host.
    """
    found, target = _TRANSFER.search(attributes), _MEGASCALE.search(attributes)
    if found is None or target is None:
        return None
    members = target.group(1)
    return _KINDS.get(found.group(1), "collective-permute"), 2 if "->" in members else members.count(",") + 1


def group_size(attributes: str, kind: str) -> int | None:
    """Returns the number of chips in a group of a collective, or None if it names no groups.

    Args:
        attributes: The attributes of the instruction.
        kind: The kind of collective.
    """
    if kind == "collective-permute":
        return 2
    group = first_group(attributes)
    return None if group is None else len(group)


def slices_within(attributes: str, slices: Sequence[int]) -> int:
    """Returns the number of slices that a group of a collective spans; all of them if it names no groups.

    Args:
        attributes: The attributes of the instruction.
        slices: The slice of each chip, in the order of the program's partitions.
    """
    if pairs := _PAIRS.search(attributes):
        ends = [tuple(map(int, pair.split(","))) for pair in re.findall(r"\{([\d, ]+)\}", pairs.group(1))]
        return max((len({slices[end] for end in pair}) for pair in ends), default=1)
    group = first_group(attributes)
    return len({slices[member] for member in (range(len(slices)) if group is None else group)})


@cache
def first_group(attributes: str) -> tuple[int, ...] | None:
    """Returns the chips of the first group of a collective, or None if it names no groups."""
    if found := _MESH.search(attributes):
        return _mesh_group(found.group(1), found.group(2))
    if found := _IOTA.search(attributes):
        shape, dims = (tuple(map(int, found.group(index).split(","))) for index in (1, 2))
        chips = np.arange(np.prod(dims)).reshape(dims)
        if found.group(3):
            chips = chips.transpose([int(axis) for axis in found.group(3).split(",")])
        return tuple(chips.reshape(shape)[0].tolist())
    if found := _LISTED.search(attributes):
        return tuple(map(int, found.group(1).split(",")))
    return None


def _mesh_group(mesh: str, axes: str) -> tuple[int, ...]:
    """Reads "'replica'=2,'fsdp'=4" and "'replica','fsdp':(2)2", where (2)2 are two parts behind an outer two."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    chips = np.arange(np.prod(list(sizes.values()))).reshape(tuple(sizes.values()))
    index: list[slice | int] = [0] * len(sizes)
    for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes):
        # A part of an axis has `before` larger steps outside it, and the rest of the axis within.
        inner = sizes[name] // (int(before) * int(part)) if part else 1
        index[list(sizes).index(name)] = slice(0, inner * int(part) if part else None, inner)
    return tuple(np.ravel(chips[tuple(index)]).tolist())
