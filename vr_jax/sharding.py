"""Mesh axes, the one table parameter path -> PartitionSpec, and named activation constraints (a leaf module).

Axes: `replica` (pure data parallelism, across slices), `fsdp` (data parallelism with sharded parameters) and
`tensor` (Megatron-style: the first matrix of a pair is cut by columns, the second by rows). The batch is cut
over the first two.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("replica", "fsdp", "tensor")
BATCH_AXES = ("replica", "fsdp")
BATCH_SPEC = P(BATCH_AXES)  # leading axis of every array of a Batch


class ShardingError(ValueError):
    """A mesh that does not fit the devices, or a parameter unknown to the table; one line for the user."""


# Kernels are (in, out). Inside a stage every array has one more, leading layer axis, which is never cut.
_NORM = r"(ln_\w+|norm\d?|\w+_norm)"
PARAM_RULES: tuple[tuple[str, P], ...] = (
    (r"encoder\.patch_embed\.kernel", P(None, "fsdp")),  # 588 inputs at patch 14: not a multiple of 8
    (r"encoder\.patch_embed\.bias", P(None)),
    (r"encoder\.position_embedding", P(None, "fsdp")),
    (r"image_newline", P(None)),
    (r"decoder\.embed\.embedding", P("tensor", "fsdp")),
    (r"decoder\.lm_head\.kernel", P("fsdp", "tensor")),
    # Attention: heads are columns of q/k/v and rows of out.
    (r".+\.(attn|cross_attn|self_attn)\.(q|k|v)\.kernel", P("fsdp", "tensor")),
    (r".+\.(attn|cross_attn|self_attn)\.(q|k|v)\.bias", P("tensor")),
    (r".+\.(attn|cross_attn|self_attn)\.out\.kernel", P("tensor", "fsdp")),
    (r".+\.(attn|cross_attn|self_attn)\.out\.bias", P(None)),
    # Feed-forward layers, projectors and the refusion's up and down projections.
    (r".+\.(gate|up|fc1|ffn1)\.kernel", P("fsdp", "tensor")),
    (r".+\.(gate|up|fc1|ffn1)\.bias", P("tensor")),
    (r".+\.(down|up2|fc2|ffn2)\.kernel", P("tensor", "fsdp")),
    (r".+\.(down|up2|fc2|ffn2)\.bias", P(None)),
    # Deformable attention: offsets and weights of a head lie side by side.
    (r"refusion\..+\.(offsets|weights|value)\.kernel", P("fsdp", "tensor")),
    (r"refusion\..+\.(offsets|weights|value)\.bias", P("tensor")),
    (r"refusion\..+\.output\.kernel", P("tensor", "fsdp")),
    (r"refusion\..+\.output\.bias", P(None)),
    (r"refusion\..+\.level_embed", P()),
    # Cambrian's aggregator.
    (r"refusion\..+\.(proj_context|proj_in)\.kernel", P("fsdp", "tensor")),
    (r"refusion\..+\.pos_embed", P()),
    # Projections, learned queries and positions of the projectors; depthwise 3 x 3 kernels are vectors, nearly.
    (r"projector\.(q_proj|kv_proj|proj)\.kernel", P("fsdp", "tensor")),
    (r"projector\.(latents|query|position_embedding)", P(None, "fsdp")),
    (r"projector\.(.+\.)?conv\.(kernel|bias)", P()),
    # Vectors are too small to be worth cutting.
    (rf"(.+\.)?{_NORM}\.(scale|bias)", P()),
    (r".+\.(gate_cross|gate_self|gate_ffn)", P()),
)
_COMPILED = tuple((re.compile(pattern), spec) for pattern, spec in PARAM_RULES)
_LAYER_AXIS = re.compile(r"(^|\.)(stages|layers)\.")

# Logical names of activation axes. A name absent here is an error, None and these leave the axis whole.
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


def make_mesh(replica: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh with axes `AXES`; at most one size may be -1 and takes the remaining devices.

    On several TPU slices the slower network between slices takes `replica`, or `fsdp` where `replica` cannot
    be divided among them. Raises ShardingError where the sizes do not multiply to the number of devices."""
    devices = list(jax.devices() if devices is None else devices)
    shape = _resolve_shape({"replica": replica, "fsdp": fsdp, "tensor": tensor}, len(devices))
    axis_types = (AxisType.Auto,) * len(AXES)
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if slices == 1:
        try:
            return jax.make_mesh(shape, AXES, axis_types=axis_types, devices=devices)
        except NotImplementedError:  # an axis that is no product of whole axes of the TPU's torus: part of one
            grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
            return Mesh(grid, AXES, axis_types=axis_types)
    for axis in (0, 1):
        if shape[axis] % slices == 0:
            between = tuple(slices if i == axis else 1 for i in range(3))
            within = tuple(n // m for n, m in zip(shape, between, strict=True))
            grid = mesh_utils.create_hybrid_device_mesh(within, between, devices)
            return Mesh(grid, AXES, axis_types=axis_types)
    raise ShardingError(
        f"mesh replica x fsdp x tensor = {shape[0]} x {shape[1]} x {shape[2]} on {slices} slices: "
        f"replica or fsdp must be a multiple of {slices}"
    )


def _resolve_shape(sizes: dict[str, int], count: int) -> tuple[int, int, int]:
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
    """Dot-joined parameter path of a JAX key path into a module, a state or a dict of joined paths."""
    names = [str(next(getattr(k, a) for a in ("key", "idx", "name") if hasattr(k, a))) for k in key_path]
    return ".".join(names[:-1] if names and names[-1] == "value" else names)


def param_spec(path: str, ndim: int) -> P:
    """The table's entry for one parameter, one axis longer inside a stage.

    Raises ShardingError unless exactly one rule matches."""
    matches = [(pattern.pattern, spec) for pattern, spec in _COMPILED if pattern.fullmatch(path)]
    if len(matches) != 1:
        found = "no rule" if not matches else f"{len(matches)} rules ({', '.join(p for p, _ in matches)})"
        raise ShardingError(f"parameter {path!r} matches {found} of vr_jax/sharding.py, expected exactly one")
    spec = matches[0][1]
    lead = 1 if _LAYER_AXIS.search(path) else 0
    if len(spec) + lead > ndim:
        raise ShardingError(f"parameter {path!r} has {ndim} axes, rule {matches[0][0]!r} needs {len(spec) + lead}")
    return P(*(None,) * lead, *spec, *(None,) * (ndim - lead - len(spec)))


def _fit(spec: Iterable[Any], shape: Sequence[int], mesh: Mesh | AbstractMesh) -> P:
    """`spec` without the entries whose mesh axes do not divide the array's axis: those stay whole."""
    entries = []
    for size, entry in zip(shape, spec, strict=True):
        axes = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        entries.append(entry if size % math.prod(mesh.shape[a] for a in axes) == 0 else None)
    return P(*entries)


def param_shardings(abstract_tree: Any, mesh: Mesh) -> Any:
    """A tree of NamedSharding for a tree of parameters (anything with `shape`), by the table.

    An axis that its mesh axis does not divide stays whole, which costs memory and never correctness;
    `unsharded` lists those, so that a run can warn about them."""

    def sharding(key_path, leaf):
        path = path_of(key_path)
        return NamedSharding(mesh, _fit(param_spec(path, len(leaf.shape)), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding, abstract_tree)


def unsharded(abstract_tree: Any, mesh: Mesh | AbstractMesh) -> list[str]:
    """One line per parameter axis that the table would cut on this mesh but that does not divide."""
    lines = []
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(abstract_tree):
        path = path_of(key_path)
        spec = param_spec(path, len(leaf.shape))
        fitted = _fit(spec, leaf.shape, mesh)
        lines += [
            f"{path} {tuple(leaf.shape)}: axis {i} is not divisible by {wanted}={mesh.shape[wanted]}"
            for i, (wanted, kept) in enumerate(zip(spec, fitted, strict=True))
            if wanted != kept
        ]
    return lines


def _logical_entries(shape: Sequence[int], names: Sequence[str | None]) -> list[Any]:
    unknown = [n for n in names if n is not None and n not in ACTIVATION_AXES]
    if unknown or len(names) != len(shape):
        raise ShardingError(
            f"logical axes {tuple(names)} of an array of shape {tuple(shape)}: expected {len(shape)} names among "
            f"{sorted(ACTIVATION_AXES)}"
        )
    return [None if name is None else ACTIVATION_AXES[name] for name in names]


def mesh_in_context() -> AbstractMesh | None:
    """The mesh of `jax.set_mesh` if it has several devices and our axes, not yet taken by a shard_map; else None."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 or not set(AXES) <= set(mesh.auto_axes) else mesh


def platform() -> str:
    """What the computation is compiled for, "cpu", "gpu" or "tpu": the mesh's devices, which ahead of time are not this
    machine's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = device.platform if device is not None else jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name


def activation_spec(shape: Sequence[int], *names: str | None, mesh: Mesh | AbstractMesh) -> P:
    """PartitionSpec of an activation, one logical name (a key of ACTIVATION_AXES, or None) per axis.

    An axis that does not divide stays whole, so that one prompt can be answered on a mesh that trains on many.
    Raises ShardingError for an unknown name or a wrong count of names."""
    return _fit(_logical_entries(shape, names), shape, mesh)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrains the sharding of `x` to its `activation_spec`; without a mesh in context, `x` unchanged."""
    entries = _logical_entries(x.shape, names)
    mesh = mesh_in_context()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, _fit(entries, x.shape, mesh))


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """How many pieces the rows of a batch are cut into."""
    return int(np.prod([mesh.shape[a] for a in BATCH_AXES]))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of every array of a Batch: rows over (replica, fsdp)."""
    return NamedSharding(mesh, BATCH_SPEC)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())
