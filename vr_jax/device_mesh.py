"""Chooses the sizes of the mesh's axes and places the devices on it, of one slice or of several (a leaf module).

The axes are `replica` (data parallelism), `fsdp` (data parallelism with sharded parameters) and `tensor` (as in
Megatron). A slice is a group of devices with a fast network among them: a TPU slice, whose number JAX's devices carry
as `slice_index`, or a group that the caller names. Between slices the network is slower by orders of magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from vr_jax.errors import UserError

AXES = ("replica", "fsdp", "tensor")
AS_SET = "as config.mesh has it"
_TYPES = (AxisType.Auto,) * len(AXES)

# What lists the parameter axes that a mesh would cut but does not divide (`vr_jax.sharding.unsharded`).
Uneven = Callable[[AbstractMesh], list[str]]


class ShardingError(UserError):
    """A mesh that does not fit the devices, or a parameter without a rule.

    The planner's search tells it apart: it skips meshes that do not fit.
    """


class ChosenMesh(NamedTuple):
    """A mesh, and why it is as it is.

    Attributes:
        mesh: The mesh.
        slices: The number of slices that the devices are on.
        across: The axis that crosses the network between slices; None on one slice.
        rule: A phrase for the log: where the sizes come from, and what crosses the network between slices.
    """

    mesh: Mesh
    slices: int
    across: str | None
    rule: str


def make_mesh(
    replica: int = 1,
    fsdp: int = -1,
    tensor: int = 1,
    *,
    slices: int = 0,
    devices: Sequence[jax.Device] | None = None,
    uneven: Uneven | None = None,
) -> Mesh:
    """The mesh of `choose_mesh`, for callers that do not tell why it is as it is."""
    return choose_mesh(replica, fsdp, tensor, slices=slices, devices=devices, uneven=uneven).mesh


def choose_mesh(
    replica: int = 1,
    fsdp: int = -1,
    tensor: int = 1,
    *,
    slices: int = 0,
    devices: Sequence[jax.Device] | None = None,
    uneven: Uneven | None = None,
) -> ChosenMesh:
    """Chooses the sizes that are left open, and places the devices.

    Where both `replica` and `fsdp` are -1, `fsdp` is the largest number of devices of a slice that divides the widths
    of all parameters, and `replica` takes the rest. On several slices `replica` crosses the network between them, or
    `fsdp` where `replica` is given and cannot be divided among them.

    Args:
        replica: Size of the axis; -1 takes the remaining devices.
        fsdp: Size of the axis, likewise. At most one size may be -1, or these two.
        tensor: Size of the axis, likewise.
        slices: The number of slices; 0 takes that of the devices. Devices that do not tell, such as CPUs, are divided
            in their order into as many equal groups.
        devices: The devices; by default all of them.
        uneven: Lists the parameter axes that a mesh does not divide; without it every `fsdp` is taken to divide them.

    Raises:
        ShardingError: The sizes do not multiply to the number of devices, or do not fit the slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    groups = slice_groups(devices, slices)
    sizes = {"replica": replica, "fsdp": fsdp, "tensor": tensor}
    if replica == fsdp == -1:
        shape, rule = _by_rule(sizes, len(devices), len(groups), uneven)
    else:
        shape = _resolve_shape(sizes, len(devices))
        rule = AS_SET
    if len(groups) == 1:
        return ChosenMesh(Mesh(_grid(shape, devices), AXES, axis_types=_TYPES), 1, None, rule)
    across = next((axis for axis in (0, 1) if shape[axis] % len(groups) == 0), None)
    if across is None:
        raise ShardingError(
            f"mesh replica x fsdp x tensor = {shape[0]} x {shape[1]} x {shape[2]} on {len(groups)} slices: "
            f"replica or fsdp must be a multiple of {len(groups)}"
        )
    within = tuple(size // len(groups) if axis == across else size for axis, size in enumerate(shape))
    # This is the layout of `mesh_utils.create_hybrid_device_mesh`, which knows no groups but `slice_index`.
    grid = np.concatenate([_grid(within, group) for group in groups], axis=across)
    rule += (
        f"; replica crosses the network between the {len(groups)} slices, over which gradients are summed once per "
        "update"
        if across == 0
        else f"; fsdp crosses the network between the {len(groups)} slices, over which every layer's parameters are "
        "gathered; a config.mesh.replica that is a multiple of their number keeps them within a slice"
    )
    return ChosenMesh(Mesh(grid, AXES, axis_types=_TYPES), len(groups), AXES[across], rule)


def slice_groups(devices: Sequence[jax.Device], slices: int = 0) -> list[list[jax.Device]]:
    """Divides devices into their slices, in the order of the slices' numbers.

    Args:
        devices: The devices.
        slices: The number of slices, as `choose_mesh` takes it.

    Raises:
        ShardingError: The devices are on another number of slices, or cannot be divided into as many equal ones.
    """
    numbers = [getattr(device, "slice_index", 0) or 0 for device in devices]
    found = {number: [d for d, own in zip(devices, numbers, strict=True) if own == number] for number in set(numbers)}
    if len(found) == 1 and slices > 1:
        if len(devices) % slices:
            raise ShardingError(f"config.mesh.slices = {slices} does not divide the {len(devices)} devices")
        each = len(devices) // slices
        return [list(devices[begin : begin + each]) for begin in range(0, len(devices), each)]
    if slices not in (0, len(found)):
        raise ShardingError(
            f"config.mesh.slices = {slices}, and the devices are on {len(found)} slices; leave it at 0, which takes "
            "theirs"
        )
    if len({len(group) for group in found.values()}) > 1:
        counts = ", ".join(str(len(found[number])) for number in sorted(found))
        raise ShardingError(f"the slices have {counts} devices; expected the same number on each")
    return [found[number] for number in sorted(found)]


def _grid(shape: Sequence[int], devices: list[jax.Device]) -> np.ndarray:
    """Places the devices of one slice so that neighbours on the mesh are near each other."""
    try:
        return mesh_utils.create_device_mesh(tuple(shape), devices)
    except NotImplementedError:
        # A mesh axis that is no product of whole axes of the TPU's torus takes a part of one.
        return mesh_utils.create_device_mesh(tuple(shape), devices, allow_split_physical_axes=True)


def _by_rule(sizes: dict[str, int], count: int, slices: int, uneven: Uneven | None) -> tuple[tuple[int, int, int], str]:
    """The sizes where `replica` and `fsdp` are left open, and why they are so."""
    tensor = sizes["tensor"]
    each = count // slices
    if tensor < 1 or each % tensor:
        raise ShardingError(
            f"mesh {_text(sizes)} needs a tensor that divides the {each} devices{_of_a_slice(slices)}; change "
            "config.mesh.tensor"
        )
    shared = each // tensor
    why = f"fsdp = {shared}, all devices{_of_a_slice(slices)}"
    left: list[str] = []
    for fsdp in (number for number in range(shared, 0, -1) if shared % number == 0):
        # Rows and widths that `tensor` cuts do not depend on the choice.
        lines = [] if uneven is None else uneven(AbstractMesh((count // fsdp, fsdp, 1), AXES, axis_types=_TYPES))
        if not lines:
            break
        left = lines
    if fsdp < shared:
        why = (
            f"fsdp = {fsdp}, the largest divisor of the {shared} devices{_of_a_slice(slices)} that divides the widths "
            f"of all parameters (not {left[0]})"
        )
    tensors = f", over tensor = {tensor}" if tensor > 1 else ""
    return (count // tensor // fsdp, fsdp, tensor), f"by the rule: {why}{tensors}; replica takes the rest"


def _of_a_slice(slices: int) -> str:
    return " of a slice" if slices > 1 else ""


def _text(sizes: dict[str, int]) -> str:
    return " x ".join(f"{name}={size}" for name, size in sizes.items())


def _resolve_shape(sizes: dict[str, int], count: int) -> tuple[int, int, int]:
    """The three sizes for `count` devices, without -1."""
    product = _text(sizes)
    wrong = [name for name, size in sizes.items() if size != -1 and size < 1]
    if wrong or list(sizes.values()).count(-1) > 1:
        raise ShardingError(
            f"mesh {product}: sizes must be positive, and at most one may be -1 (the remaining devices), or replica "
            "and fsdp (chosen by the rule)"
        )
    known = math.prod(size for size in sizes.values() if size != -1)
    if -1 in sizes.values() and count % known == 0:
        sizes = {name: count // known if size == -1 else size for name, size in sizes.items()}
    if math.prod(sizes.values()) != count:
        raise ShardingError(
            f"mesh {product} needs {'a multiple of ' if -1 in sizes.values() else ''}{known} devices, "
            f"found {count}; change config.mesh so that replica * fsdp * tensor equals the number of devices"
        )
    return sizes["replica"], sizes["fsdp"], sizes["tensor"]
