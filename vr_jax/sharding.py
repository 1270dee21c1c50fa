"""Mesh axes, the sharding rules of parameters by path, and named constraints of activations (a leaf module).

The axes are `replica` (data parallelism, across slices), `fsdp` (data parallelism with sharded parameters) and `tensor`
(as in Megatron: the first matrix of a pair is cut by columns, the second by rows). A batch is cut over the first two.
See docs/design/decisions.md#decision-8.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vr_jax.device_mesh import AS_SET as AS_SET
from vr_jax.device_mesh import AXES as AXES
from vr_jax.device_mesh import ChosenMesh as ChosenMesh
from vr_jax.device_mesh import ShardingError as ShardingError
from vr_jax.device_mesh import choose_mesh as choose_mesh
from vr_jax.device_mesh import make_mesh as make_mesh

BATCH_AXES = ("replica", "fsdp")
# Every array of a Batch is cut along its leading axis.
BATCH_SPEC = P(BATCH_AXES)

Rules = tuple[tuple[str, P], ...]


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
    """The partition without the entries whose mesh axes do not divide the array's axis, which then stays whole.

    Mesh axes that a shard_map around this has taken (`sum_over_replicas`) are left out: they do not cut what is within.
    """
    taken = set(mesh.manual_axes)
    entries: list[Any] = []
    for size, entry in zip(shape, spec, strict=True):
        axes = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        left = tuple(axis for axis in axes if axis not in taken)
        divides = size % math.prod(mesh.shape[axis] for axis in left) == 0
        entries.append((entry if left == axes else left or None) if divides else None)
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
    """The mesh of `jax.set_mesh`, if it has our axes and several devices that no shard_map has taken; else None.

    Within `sum_over_replicas` it is the same mesh, of which `replica` is taken.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(AXES) <= {*mesh.auto_axes, *mesh.manual_axes}:
        return None
    return mesh if math.prod(mesh.shape[axis] for axis in mesh.auto_axes) > 1 else None


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


def part_shape(shape: Sequence[int], spec: P, mesh: Mesh | AbstractMesh) -> tuple[int, ...]:
    """The shape of one device's part of an array, which every entry of the partition divides.

    `NamedSharding.shard_shape` knows no mesh of which a shard_map has taken an axis.
    """
    entries = (() if entry is None else (entry,) if isinstance(entry, str) else entry for entry in spec)
    return tuple(
        size // math.prod(mesh.shape[axis] for axis in axes) for size, axes in zip(shape, entries, strict=True)
    )


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


def take_rows(table: jax.Array, index: jax.Array) -> jax.Array:
    """Returns `table[index]` for a table that is cut as an embedding is, rows over `tensor` and columns over `fsdp`.

    XLA partitions it, but for one case: jaxlib 0.12.0 ends the process where both axes have several devices within
    `sum_over_replicas`. There each device looks up its columns of its own rows for all rows of the batch, which costs
    less than gathering a vocabulary, and the columns are then exchanged.

    Args:
        table: The rows (V, D).
        index: The rows to take, (B, N), each in 0..V-1.
    """
    mesh = mesh_in_context()
    spec = None if mesh is None else _fit(("tensor", "fsdp"), table.shape, mesh)
    if mesh is None or spec != P("tensor", "fsdp") or not mesh.manual_axes or 1 in (mesh.shape[a] for a in AXES):
        return jnp.take(table, index, axis=0)
    rows = _fit(("fsdp", None), index.shape, mesh)

    def own_columns(table: jax.Array, index: jax.Array) -> jax.Array:
        if rows[0] is not None:
            index = jax.lax.all_gather(index, "fsdp", tiled=True)
        index = index - jax.lax.axis_index("tensor") * table.shape[0]
        own = (index >= 0) & (index < table.shape[0])
        x = jnp.where(own[..., None], jnp.take(table, jnp.where(own, index, 0), axis=0), 0)
        x = jax.lax.psum(x, "tensor")
        if rows[0] is not None:
            return jax.lax.all_to_all(x, "fsdp", 0, x.ndim - 1, tiled=True)
        return jax.lax.all_gather(x, "fsdp", axis=x.ndim - 1, tiled=True)

    found: jax.Array = jax.shard_map(
        own_columns, in_specs=(spec, rows), out_specs=P(rows[0], None, None), check_vma=False
    )(table, index)
    return found


def batch_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """The mesh axes that cut the rows of a batch, without those that a shard_map around this has taken."""
    return tuple(axis for axis in BATCH_AXES if axis not in mesh.manual_axes)


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """The number of pieces that the rows of a batch are cut into."""
    return math.prod(mesh.shape[axis] for axis in batch_axes(mesh))


def sum_over_replicas(function: Callable[..., Any]) -> Callable[..., Any]:
    """Computes a sum over the rows of a batch in each replica by itself, and adds the results up once, at the end.

    Where `replica` crosses the slower network between slices, nothing crosses it before that. Left alone, XLA adds up
    over all devices wherever a sum over rows is formed, which for gradients is in each layer of each micro-batch.

    Args:
        function: Takes a batch, whose arrays are cut along their leading axis, and further trees of arrays, which are
            whole in every replica; returns a tree of arrays that are sums over the rows. Within it `replica` does not
            cut anything.

    Returns:
        A function of the same arguments. Without a mesh in context, or with one replica, it calls `function`.
    """

    def added(batch: Any, *whole: Any) -> Any:
        return jax.lax.psum(function(batch, *whole), "replica")

    def called(batch: Any, *whole: Any) -> Any:
        mesh = mesh_in_context()
        if mesh is None or mesh.shape["replica"] == 1:
            return function(batch, *whole)
        # Where no other axis has several devices, all are taken: XLA does not partition kernels over an axis that is
        # left, be it of one device.
        alone = mesh.shape["replica"] == mesh.size
        mapped = jax.shard_map(
            added,
            in_specs=(P("replica"), *(P() for _ in whole)),
            out_specs=P(),
            axis_names=set(AXES if alone else ("replica",)),
            # With the check, gradients by what is whole in every replica would be added up wherever they are formed.
            check_vma=False,
        )
        return mapped(batch, *whole)

    return called


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of every array of a batch: rows over `replica` and `fsdp`."""
    return NamedSharding(mesh, BATCH_SPEC)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that is whole on every device."""
    return NamedSharding(mesh, P())
