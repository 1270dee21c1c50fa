"""Mesh axes, the sharding rules of parameters by path, and named constraints of activations (a leaf module).

The axes are `replica` (data parallelism, across slices), `fsdp` (data parallelism with sharded parameters) and `tensor`
(as in Megatron: the first matrix of a pair is cut by columns, the second by rows). A batch is cut over the first two.
See docs/design/decisions.md#decision-8.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vr_jax.errors import UserError

AXES = ("replica", "fsdp", "tensor")
BATCH_AXES = ("replica", "fsdp")
# Every array of a Batch is cut along its leading axis.
BATCH_SPEC = P(BATCH_AXES)

Rules = tuple[tuple[str, P], ...]


class ShardingError(UserError):
    """A mesh that does not fit the devices, or a parameter without a rule.

    The planner's search tells it apart: it skips meshes that do not fit.
    """


# Patterns of whole parameter paths, and how their axes are cut. Kernels are (in, out). Inside a stack of layers every
# array has one more, leading axis, which is never cut. A method with other names declares them in its own file
# (`MethodConfig.sharding_rules`).
_NORM = r"(ln_\w+|norm\d?|\w+_norm)"
PARAM_RULES: Rules = (
    (r"image_newline", P(None)),
    (r"decoder\.embed\.embedding", P("tensor", "fsdp")),
    (r"decoder\.lm_head\.kernel", P("fsdp", "tensor")),
    # Heads are columns of the query, key and value projections, and rows of the output projection.
    (r".+\.(attn|cross_attn|self_attn)\.(q|k|v)\.kernel", P("fsdp", "tensor")),
    (r".+\.(attn|cross_attn|self_attn)\.(q|k|v)\.bias", P("tensor")),
    (r".+\.(attn|cross_attn|self_attn)\.out\.kernel", P("tensor", "fsdp")),
    (r".+\.(attn|cross_attn|self_attn)\.out\.bias", P(None)),
    # The first and the second layer of feed-forward layers, projectors and re-fusion blocks.
    (r".+\.(gate|up|fc1|ffn1)\.kernel", P("fsdp", "tensor")),
    (r".+\.(gate|up|fc1|ffn1)\.bias", P("tensor")),
    (r".+\.(down|fc2|ffn2)\.kernel", P("tensor", "fsdp")),
    (r".+\.(down|fc2|ffn2)\.bias", P(None)),
    # Vectors are too small to be worth cutting.
    (rf"(.+\.)?{_NORM}\.(scale|bias)", P()),
)
# The further parameters of a linear layer (vr_jax.model.linear).
_LIKE_KERNEL = ("kernel_codes", "kernel_scale", "lora_a", "lora_b")
_LAYER_AXIS = re.compile(r"(^|\.)(stages|layers)\.")


class _Rule(NamedTuple):
    pattern: re.Pattern[str]
    spec: P
    owner: str


_rules: list[_Rule] = [_Rule(re.compile(pattern), spec, "vr_jax/sharding.py") for pattern, spec in PARAM_RULES]

# Logical names of activation axes. None leaves the axis whole; a name that is absent here is an error.
ACTIVATION_AXES: dict[str, tuple[str, ...] | str | None] = {
    "batch": BATCH_AXES,
    "seq": None,
    "tiles": None,
    "cells": None,
    "embed": None,
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
}


def register_rules(prefix: str, rules: Rules, owner: str) -> None:
    """Adds rules for the parameters of a method.

    Args:
        prefix: The beginning of their paths, e.g. "projector".
        rules: Patterns of the rest of the path behind the prefix and its dot, and how the axes are cut. A rule that
            another method has registered in the same form is shared.
        owner: The name of the method in error messages.
    """
    for rest, spec in rules:
        pattern = re.compile(rf"{prefix}\.(?:{rest})")
        if not any(rule.pattern == pattern and rule.spec == spec for rule in _rules):
            _rules.append(_Rule(pattern, spec, owner))


def forget_rules(owner: str) -> None:
    """Removes the rules that `register_rules` has added for a method; for tests."""
    _rules[:] = [rule for rule in _rules if rule.owner != owner]


def make_mesh(replica: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes `AXES`.

    On several TPU slices `replica` crosses the slower network between slices, or `fsdp` where `replica` cannot be
    divided among them.

    Args:
        replica: Size of the axis; -1 takes the remaining devices. At most one size may be -1.
        fsdp: Size of the axis, likewise.
        tensor: Size of the axis, likewise.
        devices: The devices; by default all of them.

    Raises:
        ShardingError: The sizes do not multiply to the number of devices, or do not fit the slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = _resolve_shape({"replica": replica, "fsdp": fsdp, "tensor": tensor}, len(devices))
    axis_types = (AxisType.Auto,) * len(AXES)
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if slices == 1:
        try:
            return jax.make_mesh(shape, AXES, axis_types=axis_types, devices=devices)
        except NotImplementedError:
            # A mesh axis that is no product of whole axes of the TPU's torus takes a part of one.
            grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
            return Mesh(grid, AXES, axis_types=axis_types)
    for axis in (0, 1):
        if shape[axis] % slices == 0:
            across = tuple(slices if i == axis else 1 for i in range(3))
            within = tuple(n // m for n, m in zip(shape, across, strict=True))
            grid = mesh_utils.create_hybrid_device_mesh(within, across, devices)
            return Mesh(grid, AXES, axis_types=axis_types)
    raise ShardingError(
        f"mesh replica x fsdp x tensor = {shape[0]} x {shape[1]} x {shape[2]} on {slices} slices: "
        f"replica or fsdp must be a multiple of {slices}"
    )


def _resolve_shape(sizes: dict[str, int], count: int) -> tuple[int, int, int]:
    """The three sizes for `count` devices, without -1."""
    product = " x ".join(f"{name}={size}" for name, size in sizes.items())
    wrong = [name for name, size in sizes.items() if size != -1 and size < 1]
    if wrong or list(sizes.values()).count(-1) > 1:
        raise ShardingError(
            f"mesh {product}: sizes must be positive, and at most one may be -1 (the remaining devices)"
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


def path_of(key_path: Sequence[Any]) -> str:
    """The dot-joined parameter path of a JAX key path into a module, a state, or a dictionary of joined paths."""
    names = [str(next(getattr(k, a) for a in ("key", "idx", "name") if hasattr(k, a))) for k in key_path]
    return ".".join(names[:-1] if names and names[-1] == "value" else names)


def param_spec(path: str, ndim: int) -> P:
    """The partition of one parameter by its rule, one axis longer inside a stack of layers.

    What stands in the place of a kernel, or beside it, follows the rule of the kernel: the codes and scales of a
    quantised one are cut as it is, and the matrices of an adapter along the axis that they share with it.

    Args:
        path: The parameter's path, e.g. "decoder.stages.0.mlp.up.kernel".
        ndim: Its number of axes.

    Raises:
        ShardingError: Not exactly one rule matches, or the rule has more axes than the parameter.
    """
    stem, _, name = path.rpartition(".")
    if name in _LIKE_KERNEL:
        kernel: list[Any] = list(param_spec(f"{stem}.kernel", ndim))
        whole = {"lora_a": -1, "lora_b": -2}.get(name)  # the axis of the rank, which is small
        if whole is not None:
            kernel[whole] = None
        return P(*kernel)
    matches = [rule for rule in _rules if rule.pattern.fullmatch(path)]
    if len(matches) != 1:
        listed = ", ".join(f"{rule.pattern.pattern} of {rule.owner}" for rule in matches)
        found = f"{len(matches)} rules ({listed})" if matches else "no rule of vr_jax/sharding.py or of its method"
        raise ShardingError(f"parameter {path!r} matches {found}, expected exactly one; see `sharding_rules`")
    pattern, spec, _ = matches[0]
    lead = 1 if _LAYER_AXIS.search(path) else 0
    if len(spec) + lead > ndim:
        raise ShardingError(f"parameter {path!r} has {ndim} axes, rule {pattern.pattern!r} needs {len(spec) + lead}")
    return P(*(None,) * lead, *spec, *(None,) * (ndim - lead - len(spec)))


def _fit(spec: Iterable[Any], shape: Sequence[int], mesh: Mesh | AbstractMesh) -> P:
    """The partition without the entries whose mesh axes do not divide the array's axis, which then stays whole."""
    entries = []
    for size, entry in zip(shape, spec, strict=True):
        axes = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        entries.append(entry if size % math.prod(mesh.shape[a] for a in axes) == 0 else None)
    return P(*entries)


def param_shardings(abstract_tree: Any, mesh: Mesh) -> Any:
    """The shardings of a tree of parameters by their rules.

    An axis that its mesh axis does not divide stays whole, which costs memory and never correctness. `unsharded` lists
    these axes, so that a run can warn about them.

    Args:
        abstract_tree: Parameters, or anything with a `shape` in their places.
        mesh: The mesh.

    Returns:
        A tree of NamedSharding.
    """

    def sharding(key_path: Sequence[Any], leaf: Any) -> NamedSharding:
        path = path_of(key_path)
        return NamedSharding(mesh, _fit(param_spec(path, len(leaf.shape)), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding, abstract_tree)


def unsharded(abstract_tree: Any, mesh: Mesh | AbstractMesh) -> list[str]:
    """One line for each parameter axis that a rule cuts on this mesh but that does not divide."""
    lines = []
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(abstract_tree):
        path = path_of(key_path)
        spec = param_spec(path, len(leaf.shape))
        fitted = _fit(spec, leaf.shape, mesh)
        lines += [
            f"{path} {tuple(leaf.shape)}: axis {i} is not divisible by {wanted}={mesh.shape[wanted]}"
            for i, (wanted, kept) in enumerate(zip(spec, fitted, strict=True))
            if wanted != kept and not path.endswith(".kernel_scale")  # which is small
        ]
    return lines


def _logical_entries(shape: Sequence[int], names: Sequence[str | None]) -> list[Any]:
    """The mesh axes of each axis of an activation."""
    unknown = [n for n in names if n is not None and n not in ACTIVATION_AXES]
    if unknown or len(names) != len(shape):
        raise ShardingError(
            f"logical axes {tuple(names)} of an array of shape {tuple(shape)}: expected {len(shape)} names among "
            f"{sorted(ACTIVATION_AXES)}"
        )
    return [None if name is None else ACTIVATION_AXES[name] for name in names]


def mesh_in_context() -> AbstractMesh | None:
    """The mesh of `jax.set_mesh` if it has several devices and our axes and no shard_map has taken it; else None."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 or not set(AXES) <= set(mesh.auto_axes) else mesh


def platform() -> str:
    """The platform that the computation is compiled for: "cpu", "gpu" or "tpu".

    It is that of the mesh's devices, which are not this machine's when a program is compiled ahead of time.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = device.platform if device is not None else jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name


def activation_spec(shape: Sequence[int], *names: str | None, mesh: Mesh | AbstractMesh) -> P:
    """The partition of an activation.

    An axis that does not divide stays whole, so that one prompt can be answered on a mesh that trains on many.

    Args:
        shape: The activation's shape.
        *names: One logical name (a key of `ACTIVATION_AXES`, or None) for each axis.
        mesh: The mesh.

    Raises:
        ShardingError: A name is unknown, or there are not as many names as axes.
    """
    return _fit(_logical_entries(shape, names), shape, mesh)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrains the sharding of an array to its `activation_spec`; without a mesh in context it does nothing."""
    entries = _logical_entries(x.shape, names)
    mesh = mesh_in_context()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, _fit(entries, x.shape, mesh))


def product_axes(path: str, ndim: int) -> tuple[str | None, str | None]:
    """Returns how the last two axes of a kernel are cut while it is multiplied with: over `tensor`, by its rule.

    Args:
        path: The parameter's path.
        ndim: Its number of axes.
    """
    inputs, outputs = ("tensor" if entry == "tensor" else None for entry in param_spec(path, ndim)[-2:])
    return inputs, outputs


def gather_kernel(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """Gathers what `fsdp` cuts of a kernel, or of its codes; without a mesh in context it does nothing.

    Args:
        x: The array.
        axes: How it is cut afterwards (`product_axes`).
    """
    mesh = mesh_in_context()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, _fit(axes, x.shape, mesh))


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """The number of pieces that the rows of a batch are cut into."""
    return int(np.prod([mesh.shape[a] for a in BATCH_AXES]))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of every array of a batch: rows over `replica` and `fsdp`."""
    return NamedSharding(mesh, BATCH_SPEC)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that is whole on every device."""
    return NamedSharding(mesh, P())
