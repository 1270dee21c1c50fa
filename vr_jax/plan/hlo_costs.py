"""Counts the work of one run of a compiled program on one chip: operations, memory traffic, and messages.

XLA's own `cost_analysis` counts the body of a loop once, and the CUDA compiler has none ahead of time. Here every
computation counts as often as it runs. Of several branches the most expensive one counts.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

from vr_jax.plan.hlo_groups import group_size, slice_transfer, slices_within
from vr_jax.plan.hlo_text import ArrayType, Computation, Instruction, Module, parse

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

_FREE = {
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id"),
    *("opt-barrier", "domain", "add-dependency"),
}
_FREE_TARGETS = {"AllocateBuffer", "ConcatBitcast", "Sharding", "AssumeGatherIndicesInBound"}
_GEMM_TARGETS = ("__cublas$gemm", "__cublas$lt$matmul", "__onednn$matmul")
_ASYNC_START = "AsyncCollectiveStart"


@dataclass
class Costs:
    """The work of one run on one chip.

    Attributes:
        flops: Operations of matrix products, convolutions and library calls; a multiply-add counts as two.
        hbm_bytes: Bytes read and written in device memory. Data that stays in a TPU's VMEM does not count.
        collectives: For each kind of collective and size of its group, the bytes that this chip sends in a ring to
            chips of its slice.
        across: For each kind of collective and number of slices, the bytes that this chip sends to other slices.
        kernels: Custom calls whose work the text does not tell, and how often each runs.
    """

    flops: float = 0.0
    hbm_bytes: float = 0.0
    collectives: Counter[tuple[str, int]] = field(default_factory=Counter)
    across: Counter[tuple[str, int]] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)

    def add(self, other: Costs, times: float = 1.0) -> None:
        """Adds the work of a computation that runs `times` times."""
        self.flops += times * other.flops
        self.hbm_bytes += times * other.hbm_bytes
        for own, more in ((self.collectives, other.collectives), (self.across, other.across)):
            for key, sent in more.items():
                own[key] += times * sent  # type: ignore[assignment]  # Counter is typed for integers
        for name, count in other.kernels.items():
            self.kernels[name] += times * count  # type: ignore[assignment]  # Counter is typed for integers


def program_costs(text: str, slices: Sequence[int] | None = None) -> Costs:
    """Returns the costs of a compiled program.

    Args:
        text: The program, `compiled.as_text()`.
        slices: The slice of each chip, in the order of the program's partitions, for a compiler that knows no slices.
            What crosses them is then counted as libtpu cuts it: a part within each slice, and one across.

    Raises:
        UserError: The text has an unknown form.
    """
    module = parse(text)
    return _Walk(module, text, slices).computation(module.entry.name)


class _Walk:
    """Walks over the computations of a program and adds up their costs."""

    def __init__(self, module: Module, text: str, slices: Sequence[int] | None):
        self._module, self._slices = module, slices
        partitions = re.search(r"num_partitions=(\d+)", text[: text.index("\n")])
        # A collective that names no group is one of all partitions.
        self._partitions = int(partitions.group(1)) if partitions else 1
        self.computation = cache(self._computation)
        self.flops_inside = cache(self._flops_inside)
        # These are the channels of collectives that a TPU divides into a start, steps beside other work, and an end.
        self._split_channels = {
            one.attribute("channel_id")
            for computation in module.computations.values()
            if _is_async_start(computation)
            for one in computation.instructions.values()
            if _kind(one)
        }

    def _computation(self, name: str) -> Costs:
        computation = self._module.computations[name]
        total = Costs()
        for one in computation.instructions.values():
            self._add(total, computation, one)
        return total

    def _add(self, total: Costs, computation: Computation, one: Instruction) -> None:
        opcode = one.opcode
        if opcode in _FREE or opcode.endswith(("-done", "-update")):
            return
        if opcode == "while":
            body = one.attribute("body")
            assert body is not None
            total.add(self.computation(body.lstrip("%")), self._trips(computation, one))
        elif opcode == "conditional":
            branches = [self.computation(branch) for branch in one.called]
            total.add(max(branches, key=lambda branch: (branch.flops, branch.hbm_bytes)))
        elif opcode in ("call", "call-start", "async-start"):
            for called in one.called:
                total.add(self.computation(called))
        elif opcode in ("fusion", "fusion-start"):
            inside = self.flops_inside(one.called[0])
            total.add(dataclasses.replace(inside, hbm_bytes=self._fusion_bytes(computation, one)))
        else:
            total.add(self._single(computation, one))
            total.hbm_bytes += self._bytes(computation, one)

    def _flops_inside(self, name: str) -> Costs:
        """Returns the work of a fused computation; the memory traffic is counted at the fusion."""
        computation = self._module.computations[name]
        total = Costs()
        for one in computation.instructions.values():
            if one.opcode == "fusion":
                total.add(self.flops_inside(one.called[0]))
            else:
                total.add(self._single(computation, one))
        return total

    def _single(self, computation: Computation, one: Instruction) -> Costs:
        """Returns the operations and messages of one instruction that calls no computation."""
        if kind := _kind(one):
            return self._collective(computation, one, kind)
        if one.opcode == "dot":
            return Costs(self._contracted(computation, one, one.integers("lhs_contracting_dims")))
        if one.opcode == "convolution":
            left, right = (self._type(computation, operand) for operand in one.operands[:2])
            return Costs(convolution_flops(left.dims, right.dims, one.arrays[0].dims, one.attributes))
        if one.opcode == "custom-call":
            return self._custom_call(computation, one)
        if one.opcode == "send" and (transfer := slice_transfer(one.attributes)):
            kind, slices = transfer
            sent = _sent(kind, self._type(computation, one.operands[0]).bytes, slices)
            return Costs(across=Counter({transfer: sent}))  # type: ignore[dict-item]  # Counter is typed for integers
        return Costs()

    def _custom_call(self, computation: Computation, one: Instruction) -> Costs:
        target = (one.attribute("custom_call_target") or "").strip('"')
        if target.startswith(_GEMM_TARGETS):
            found = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', one.attributes)
            axes = tuple(int(number) for number in re.findall(r"\d+", found.group(1))) if found else ()
            return Costs(self._contracted(computation, one, axes))
        if target.startswith("__cudnn$fmha"):
            query, key = (self._type(computation, operand).dims for operand in one.operands[:2])
            # The shapes are (batch, queries, heads, channels). The forward pass has two products, the backward pass
            # five.
            products = 5 if "Backward" in target else 2
            return Costs(2.0 * products * math.prod(query) * key[1])
        if "custom_call" in target or "pallas" in target or "triton" in target or "mosaic" in target:
            return Costs(kernels=Counter([target]))
        return Costs()

    def _collective(self, computation: Computation, one: Instruction, kind: str) -> Costs:
        if one.attribute("channel_id") in self._split_channels and not _is_async_start(computation):
            # This is a step of a collective that is counted at its start.
            return Costs()
        if kind == "all-reduce" and computation.root is not None and computation.root.opcode == "dynamic-slice":
            # TPUs write a reduce-scatter as an all-reduce whose result is sliced.
            kind = "reduce-scatter"
        operands = sum(self._type(computation, operand).bytes for operand in one.operands)
        count = group_size(one.attributes, kind) or self._partitions
        slices = 1 if self._slices is None else slices_within(one.attributes, self._slices)
        within = count // slices
        costs = Costs()
        if slices > 1:
            # Of what chips of a slice have in common each sends its share. A gather sends before it is one.
            share = operands / within if kind in ("all-reduce", "reduce-scatter") else operands
            costs.across[kind, slices] = _sent(kind, share, slices)  # type: ignore[assignment]  # it is typed for integers
            operands *= {"all-gather": slices, "all-to-all": 1 / slices}.get(kind, 1)
        if within > 1:
            costs.collectives[kind, within] = _sent(kind, operands, within)  # type: ignore[assignment]
        return costs

    def _contracted(self, computation: Computation, one: Instruction, axes: tuple[int, ...]) -> float:
        left = self._type(computation, one.operands[0])
        return 2.0 * one.arrays[0].size * math.prod(left.dims[axis] for axis in axes)

    def _type(self, computation: Computation, name: str) -> ArrayType:
        """Returns the first array of an operand."""
        return computation.instructions[name].arrays[0]

    def _trips(self, computation: Computation, loop: Instruction) -> int:
        """Returns how often a loop runs, or 1 if that is not known.

        The number comes from XLA's own analysis, or from a condition `counter < constant`.
        """
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known.group(1))
        condition = loop.attribute("condition")
        assert condition is not None
        inner = self._module.computations[condition.lstrip("%")]
        compare = next((one for one in inner.instructions.values() if one.opcode == "compare"), None)
        if compare is None or "direction=LT" not in compare.attributes:
            return 1
        counter, limit = (inner.instructions[name] for name in compare.operands)
        if limit.opcode != "constant" or counter.opcode != "get-tuple-element":
            return 1
        index = int(counter.attribute("index") or 0)
        left = int(limit.arguments) - self._start(computation, loop, index)
        return max(math.ceil(left / self._stride(loop, index)), 0)

    def _start(self, computation: Computation, loop: Instruction, index: int) -> int:
        carried = computation.instructions[loop.operands[0]]
        if carried.opcode != "tuple":
            return 0
        first = computation.instructions[carried.operands[index]]
        while first.opcode in ("copy", "bitcast"):
            first = computation.instructions[first.operands[0]]
        return int(first.arguments) if first.opcode == "constant" else 0

    def _stride(self, loop: Instruction, index: int) -> int:
        """Returns how much a loop's body adds to its counter, since XLA unrolls some loops and keeps their limit."""
        body = self._module.computations[(loop.attribute("body") or "").lstrip("%")]
        if body.root is None or body.root.opcode != "tuple":
            return 1
        return self._added(body, body.instructions[body.root.operands[index]]) or 1

    def _added(self, computation: Computation, one: Instruction) -> int:
        """Returns the sum of the constants that are added between a computation's parameters and an instruction."""
        if one.opcode == "fusion":
            called = self._module.computations[one.called[0]]
            total = self._added(called, called.root) if called.root is not None else 0
        elif one.opcode in ("add", "copy", "bitcast"):
            total = 0
        else:
            return 0
        for name in one.operands:
            operand = computation.instructions[name]
            total += int(operand.arguments) if operand.opcode == "constant" else self._added(computation, operand)
        return total

    def _bytes(self, computation: Computation, one: Instruction) -> float:
        """Returns the memory traffic of an instruction that is not fused."""
        if one.opcode == "custom-call" and (one.attribute("custom_call_target") or "").strip('"') in _FREE_TARGETS:
            return 0.0
        reads = [computation.instructions[name].arrays for name in one.operands if name in computation.instructions]
        if one.opcode in ("dynamic-slice", "slice", "gather"):
            return one.arrays[0].bytes * (reads[0][0].in_hbm + one.arrays[0].in_hbm)
        if one.opcode == "dynamic-update-slice":
            return reads[1][0].bytes * (reads[1][0].in_hbm + one.arrays[0].in_hbm)
        if one.opcode in ("send", "recv"):
            # The other arrays of the result are the operand again, or what the buffer holds before, and a token.
            return _hbm(one.arrays[:1])
        if one.opcode in ("copy-start", "all-gather-start", "collective-permute-start"):
            # The arrays are operand and result, in either order.
            return _hbm(one.arrays)
        return sum(_hbm(arrays) for arrays in reads) + _hbm(one.arrays)

    def _fusion_bytes(self, computation: Computation, one: Instruction) -> float:
        called = self._module.computations[one.called[0]]
        total = 0.0
        results = called.root.arrays if one.opcode == "fusion-start" and called.root is not None else one.arrays
        for position, name in enumerate(one.operands):
            arrays = computation.instructions[name].arrays
            if _hbm(arrays):
                total += min(_hbm(arrays), self._read(called, position))
        written = self._written(called)
        if len(written) != len(results):
            return total + _hbm(results)
        return total + sum(size for size, array in zip(written, results, strict=True) if array.in_hbm)

    def _read(self, computation: Computation, position: int) -> float:
        """Returns the bytes of a parameter that a fused computation reads; of an array that is sliced, the slices."""
        parameter = computation.parameters.get(position)
        if parameter is None:
            return 0.0
        return min(self._read_of(computation, parameter), sum(array.bytes for array in parameter.arrays))

    def _read_of(self, computation: Computation, one: Instruction) -> float:
        total = 0.0
        for user, operand in computation.users[one.name]:
            if user.opcode in ("dynamic-slice", "slice", "gather") and operand == 0:
                total += sum(array.bytes for array in user.arrays)
            elif user.opcode == "dynamic-update-slice" and operand == 0:
                # The array is updated in place.
                continue
            elif user.opcode in ("bitcast", "get-tuple-element"):
                total += self._read_of(computation, user)
            elif user.opcode == "fusion":
                total += self._read(self._module.computations[user.called[0]], operand)
            else:
                return sum(array.bytes for array in one.arrays)
        return total

    def _written(self, computation: Computation) -> list[float]:
        """Returns the bytes that a fused computation writes for each result; of an updated array, the update."""
        root = computation.root
        if root is None:
            return []
        roots = [computation.instructions[name] for name in root.operands] if root.opcode == "tuple" else [root]
        sizes: list[float] = []
        for one in roots:
            while one.opcode == "bitcast":
                one = computation.instructions[one.operands[0]]
            if one.opcode == "dynamic-update-slice":
                sizes.append(self._type(computation, one.operands[1]).bytes)
            elif one.opcode == "fusion" and len(one.arrays) == 1:
                sizes += self._written(self._module.computations[one.called[0]])
            else:
                sizes += [array.bytes for array in one.arrays]
        return sizes


def _hbm(arrays: tuple[ArrayType, ...]) -> float:
    return sum(array.bytes for array in arrays if array.in_hbm)


def _kind(one: Instruction) -> str | None:
    """Returns the kind of collective that an instruction starts, or None."""
    opcode = one.opcode.removesuffix("-start")
    return opcode if opcode in COLLECTIVES else None


def _is_async_start(computation: Computation) -> bool:
    return any(f'"{_ASYNC_START}"' in one.attributes for one in computation.instructions.values())


def _sent(kind: str, operands: float, count: int) -> float:
    """Returns the bytes that one of `count` members of a ring sends for operands of so many bytes."""
    share = (count - 1) / count
    return {
        "all-gather": operands * (count - 1),
        "reduce-scatter": operands * share,
        "all-reduce": 2 * operands * share,
        "all-to-all": operands * share,
        "collective-permute": operands,
    }[kind]


def convolution_flops(left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...], attributes: str) -> float:
    """Returns the operations of a convolution; a multiply-add counts as two.

    Multiplications with padding, or with the zeros of a dilation, do not count: TPUs write batched matrix products as
    such convolutions.

    Args:
        left: The shape of the input.
        right: The shape of the kernel.
        out: The shape of the result.
        attributes: The attributes of the instruction, with its window and its dimension labels.
    """
    found = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    assert found is not None, attributes[:200]
    lhs, rhs, result = found.groups()
    window = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(re.findall(r"(\w+)=([^\s}]+)", window.group(1))) if window else {}
    spatial = sorted(label for label in result if label.isdigit())

    def numbers(name: str, default: int) -> list[int]:
        return [int(part) for part in fields[name].split("x")] if name in fields else [default] * len(spatial)

    strides, before, after = numbers("stride", 1), numbers("lhs_dilate", 1), numbers("rhs_dilate", 1)
    pads = [int(part.split("_")[0]) for part in fields["pad"].split("x")] if "pad" in fields else [0] * len(spatial)
    pairs = 1
    for index, label in enumerate(spatial):
        pairs *= _pairs(
            left[lhs.index(label)],
            right[rhs.index(label)],
            out[result.index(label)],
            strides[index],
            pads[index],
            before[index],
            after[index],
        )
    return 2.0 * pairs * right[rhs.index("i")] * out[result.index("b")] * out[result.index("f")]


@cache
def _pairs(size: int, kernel: int, out: int, stride: int, pad: int, before: int, after: int) -> int:
    """Counts the pairs of output and kernel positions along one axis that multiply an element of the input."""
    reach = (size - 1) * before
    count = 0
    for position in range(out):
        for tap in range(kernel):
            at = position * stride + tap * after - pad
            count += 0 <= at <= reach and at % before == 0
    return count
