"""Compiles a traced program for a topology and collects its costs."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections import Counter
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import jax
from jax.sharding import Mesh

from vr_jax.device_mesh import slice_groups
from vr_jax.errors import UserError
from vr_jax.plan.hlo_costs import Costs, program_costs
from vr_jax.plan.jaxpr_costs import kernel_flops, matmul_flops
from vr_jax.plan.results import Memory, Roofline, Work
from vr_jax.plan.topology import Topology, compiling_for

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_OUT_OF_MEMORY = re.compile(
    r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm|"
    r"required for HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)"
)


@dataclass(frozen=True)
class Compiled:
    """A compiled program's costs, in bytes per chip where nothing else is said.

    Attributes:
        costs: The counted work, or None if the compiler gave up because the program does not fit.
        temporaries: The compiler's buffers, or None if it gave up.
        results: Results that do not take the place of an argument.
        code: The generated code.
        needed: The memory that the compiler stated when it gave up.
        capacity: The memory of a chip, or None if it is not known.
        seconds: The time of the compilation.
    """

    costs: Costs | None
    temporaries: int | None
    results: int
    code: int
    needed: float | None
    capacity: float | None
    seconds: float


def bytes_per_chip(tree: Any) -> int:
    """Returns the bytes on one chip of a tree of ShapeDtypeStructs with shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def out_of_memory(message: str) -> tuple[float, float] | None:
    """Returns the needed and the available bytes from the TPU compiler's refusal, or None for another message."""
    found = _OUT_OF_MEMORY.search(message)
    if found is None:
        return None
    needed, needed_unit, limit, limit_unit = (part for part in found.groups() if part is not None)
    return float(needed) * _UNITS[needed_unit], float(limit) * _UNITS[limit_unit]


def compile_for(topology: Topology, mesh: Mesh, traced: Any, effort: str | None) -> Compiled:
    """Compiles a traced program and counts its work.

    Args:
        topology: The devices to compile for.
        mesh: Their mesh.
        traced: The result of `jit(...).trace` under `compiling_for`.
        effort: XLA's optimization level (O0 to O3), or None for its default, which runs use.

    Raises:
        UserError: The compiler fails for another reason than memory.
    """
    began = time.perf_counter()
    capacity = topology.chip.memory if topology.chip is not None else None
    with compiling_for(topology, mesh):
        try:
            compiled = traced.lower().compile(compiler_options={"optimization_level": effort} if effort else None)
        except jax.errors.JaxRuntimeError as error:
            found = out_of_memory(str(error))
            if found is None:
                raise UserError(
                    f"{topology.name}: the compiler failed: {str(error).strip().splitlines()[0]}"
                ) from error
            return Compiled(None, None, 0, 0, *found, time.perf_counter() - began)
    seconds = time.perf_counter() - began
    costs = program_costs(compiled.as_text(), slice_numbers(topology, mesh))
    memory = compiled.memory_analysis()
    return Compiled(
        costs=costs,
        temporaries=memory.temp_size_in_bytes,
        results=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        needed=None,
        capacity=capacity,
        seconds=seconds,
    )


def slice_numbers(topology: Topology, mesh: Mesh) -> tuple[int, ...] | None:
    """Returns the slice of each device in the order of the mesh, or None where the program's text tells it.

    libtpu writes what crosses the network between slices apart. Other compilers know no slices.
    """
    if topology.slices == 1 or topology.platform == "tpu":
        return None
    groups = slice_groups(topology.devices, topology.slices)
    number = {device: index for index, group in enumerate(groups) for device in group}
    return tuple(number[device] for device in mesh.devices.flat)


def work_of(topology: Topology, mesh: Mesh, traced: Any, costs: Costs, model_flops: float) -> Work:
    """Returns the work of one run of a compiled program on one chip.

    Args:
        topology: The devices that it is compiled for.
        mesh: Their mesh.
        traced: The traced program, which tells what Pallas kernels compute.
        costs: The costs that were counted in the compiled program.
        model_flops: The operations that the model needs on all chips together.
    """
    jaxpr = traced.jaxpr.jaxpr
    kinds: Counter[str] = Counter()
    across: Counter[str] = Counter()
    for (kind, _), sent in costs.across.items():
        across[kind] += sent  # type: ignore[assignment]  # Counter is typed for integers, and bytes may be fractions
    seconds = 0.0 if topology.chip is not None else None
    for (kind, group), sent in costs.collectives.items():
        kinds[kind] += sent  # type: ignore[assignment]  # Counter is typed for integers, and bytes may be fractions
        if seconds is not None:
            seconds += sent / topology.bandwidth(group, mesh.shape["tensor"])
    return Work(
        # A kernel is a single instruction of the compiled program, whose text does not say what the kernel computes.
        flops=costs.flops + (kernel_flops(jaxpr) if costs.kernels else 0.0),
        asked_flops=matmul_flops(jaxpr) / mesh.size,
        model_flops=model_flops / mesh.size,
        hbm_bytes=costs.hbm_bytes,
        collective_bytes=dict(sorted(kinds.items())),
        collective_seconds=seconds,
        network_bytes=dict(sorted(across.items())),
        network_seconds=None if topology.chip is None else sum(across.values()) / topology.chip.network,
    )


def roofline_of(topology: Topology, work: Work) -> Roofline | None:
    """Returns the bounds on the time of one run, or None for chips whose limits are not known."""
    chip = topology.chip
    if chip is None or work.collective_seconds is None:
        return None
    compute, hbm = work.flops / chip.peak_flops, work.hbm_bytes / chip.hbm_bandwidth
    network = work.network_seconds or 0.0
    roofline = Roofline(compute=compute, hbm=hbm, interconnect=work.collective_seconds, network=network, mfu=0.0)
    return dataclasses.replace(roofline, mfu=work.model_flops / (roofline.bound * chip.peak_flops))


def memory_of(compiled: Compiled, **arguments: int) -> Memory:
    """Returns the memory of a program on one chip.

    Args:
        compiled: The compiled program.
        **arguments: Bytes of its arguments, by field of `Memory`; absent ones are 0.
    """
    kinds = dict.fromkeys(("trained", "frozen", "optimizer", "cache", "inputs"), 0)
    return Memory(
        **{**kinds, **arguments},
        temporaries=compiled.temporaries,
        results=compiled.results,
        code=compiled.code,
        capacity=compiled.capacity,
        needed=compiled.needed,
    )


def versions(topology: Topology) -> dict[str, str]:
    """Returns the versions of the libraries that a plan depends on."""
    names = ["jax", "jaxlib", "flax", *{"tpu": ["libtpu"], "gpu": ["jax-cuda13-plugin"]}.get(topology.platform, [])]
    return {name: metadata.version(name) for name in names}
