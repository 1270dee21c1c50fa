"""Counts the operations of a traced program on all chips together, before it is compiled.

This is a second, independent count beside `hlo_costs`. Work that the compiled program repeats on several chips shows as
a difference. The count also includes Pallas kernels, of which a compiled program contains only the name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from jax.extend import core


def matmul_flops(jaxpr: core.Jaxpr) -> float:
    """Returns the operations of all matrix products, convolutions and Pallas kernels.

    A multiply-add counts as two. Of several branches the most expensive one counts.
    """
    return sum(_flops(eqn) for eqn in jaxpr.eqns)


def kernel_flops(jaxpr: core.Jaxpr) -> float:
    """Returns the operations of Pallas kernels on one chip; a kernel in a shard_map runs on each chip."""
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            total += _pallas(eqn)
        elif eqn.primitive.name == "cond":
            total += max(kernel_flops(branch) for branch in _inner(eqn))
        else:
            total += _repeats(eqn) * sum(kernel_flops(part) for part in _inner(eqn))
    return total


def _flops(eqn: Any) -> float:
    name = eqn.primitive.name
    if name == "dot_general":
        (left_axes, _), _ = eqn.params["dimension_numbers"]
        left = eqn.invars[0].aval.shape
        return float(2 * eqn.outvars[0].aval.size * math.prod(left[axis] for axis in left_axes))
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval
        out_features = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
        return float(2 * eqn.outvars[0].aval.size * kernel.size / out_features)
    if name == "pallas_call":
        return _pallas(eqn)
    if name.startswith("dot_product_attention"):
        # This is cuDNN's attention, with two products in the forward and five in the backward pass.
        query, key = (variable.aval.shape for variable in eqn.invars[:2])
        return 2.0 * (5 if "bwd" in name else 2) * math.prod(query) * key[1]
    if name == "cond":
        return max(matmul_flops(branch) for branch in _inner(eqn))
    devices = 1
    if name == "shard_map":
        # The body has the shapes of one device's piece along the manual axes. jax 0.12 renamed the parameter of 0.11.
        manual = "newly_manual_axes" if "newly_manual_axes" in eqn.params else "manual_axes"
        devices = math.prod(eqn.params["mesh"].shape[axis] for axis in eqn.params[manual])
    return devices * _repeats(eqn) * sum(matmul_flops(part) for part in _inner(eqn))


def _pallas(eqn: Any) -> float:
    estimate = eqn.params.get("cost_estimate")
    if estimate is not None:
        return float(estimate.flops)
    grid = [size if isinstance(size, int) else 1 for size in eqn.params["grid_mapping"].grid]
    return math.prod(grid) * matmul_flops(eqn.params["jaxpr"])


def _repeats(eqn: Any) -> int:
    """Returns how often the inner programs of an equation run; a `while` counts once."""
    return eqn.params["length"] if eqn.primitive.name == "scan" else 1


def _inner(eqn: Any) -> Iterator[core.Jaxpr]:
    for value in eqn.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, core.ClosedJaxpr):
                yield part.jaxpr
            elif isinstance(part, core.Jaxpr):
                yield part
