"""Operations that a traced program asks for, on all chips together, before any compiler has seen it.

The second count beside `hlo_costs`: what the compiler repeats on several chips shows as a difference. It also knows
what kernels do, of which a compiled program shows only the name."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from jax.extend import core


def matmul_flops(jaxpr: core.Jaxpr) -> float:
    """2 per multiply-add of all matrix products, convolutions and kernels; of branches the most expensive one."""
    return sum(_flops(eqn) for eqn in jaxpr.eqns)


def kernel_flops(jaxpr: core.Jaxpr) -> float:
    """Of `matmul_flops`, what Pallas kernels do, per chip: a kernel in a shard_map runs on each of them."""
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
        return 2.0 * eqn.outvars[0].aval.size * math.prod(left[axis] for axis in left_axes)
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval
        out_features = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * eqn.outvars[0].aval.size * kernel.size / out_features
    if name == "pallas_call":
        return _pallas(eqn)
    if name.startswith("dot_product_attention"):  # cuDNN's
        query, key = (variable.aval.shape for variable in eqn.invars[:2])
        return 2.0 * (5 if "bwd" in name else 2) * math.prod(query) * key[1]
    if name == "cond":
        return max(matmul_flops(branch) for branch in _inner(eqn))
    devices = 1
    if name == "shard_map":  # its body sees one device's piece along the axes that it takes by hand
        by_hand = "newly_manual_axes" if "newly_manual_axes" in eqn.params else "manual_axes"  # jax 0.12, 0.11
        devices = math.prod(eqn.params["mesh"].shape[axis] for axis in eqn.params[by_hand])
    return devices * _repeats(eqn) * sum(matmul_flops(part) for part in _inner(eqn))


def _pallas(eqn: Any) -> float:
    estimate = eqn.params.get("cost_estimate")
    if estimate is not None:
        return float(estimate.flops)
    grid = [size if isinstance(size, int) else 1 for size in eqn.params["grid_mapping"].grid]
    return math.prod(grid) * matmul_flops(eqn.params["jaxpr"])


def _repeats(eqn: Any) -> int:
    """How often the inner programs run; a `while` without a known number counts once."""
    return eqn.params["length"] if eqn.primitive.name == "scan" else 1


def _inner(eqn: Any) -> Iterator[core.Jaxpr]:
    for value in eqn.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, core.ClosedJaxpr):
                yield part.jaxpr
            elif isinstance(part, core.Jaxpr):
                yield part
