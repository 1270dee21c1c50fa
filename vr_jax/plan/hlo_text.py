"""Parses the text of a compiled XLA program (`compiled.as_text()`) into computations of instructions."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from vr_jax.errors import UserError

_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16}
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([0-9,<=]*)\](\{[^}]*\})?")
_FAST_MEMORY = re.compile(r"S\(([1-9]\d*)\)")
_HEADER = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\{\s*$")
_END = re.compile(r"^\}(, execution_thread=.*)?\s*$")
_NAMED = re.compile(r"^\s+(ROOT )?%?([^\s=]+) = ")
_OPERAND = re.compile(r"%([^\s,()]+)")


@dataclass(frozen=True)
class ArrayType:
    """One array of an instruction's result.

    Attributes:
        dtype: XLA's name of the element type.
        dims: The shape.
        in_hbm: Whether the array lies in device memory; a layout may name another memory, such as S(1), a TPU's VMEM.
    """

    dtype: str
    dims: tuple[int, ...]
    in_hbm: bool

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        """The size in bytes, without the padding of tiles."""
        bits = _BITS.get(self.dtype)
        if bits is None:
            digits = re.search(r"\d+", self.dtype)
            bits = int(digits.group()) if digits else 8
        return self.size * bits / 8


@dataclass(frozen=True)
class Instruction:
    """One instruction of a computation.

    Attributes:
        name: Its name within the computation.
        arrays: The arrays of its result; those of a tuple are flattened.
        opcode: Its operation.
        operands: The names of its operands.
        arguments: The text between its parentheses.
        attributes: The text behind its parentheses.
        root: Whether its result is that of the computation.
    """

    name: str
    arrays: tuple[ArrayType, ...]
    opcode: str
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    root: bool

    def attribute(self, name: str) -> str | None:
        """Returns the word, or the text in braces, behind `name=`; None if it is absent."""
        found = re.search(rf"[ ,]{name}=(\{{[^}}]*\}}|[^,\s]+)", self.attributes)
        return found.group(1) if found else None

    def integers(self, name: str) -> tuple[int, ...]:
        """Returns the numbers of an attribute such as dimensions={0,2}, or an empty tuple if it is absent."""
        return tuple(int(number) for number in re.findall(r"\d+", self.attribute(name) or ""))

    @cached_property
    def called(self) -> tuple[str, ...]:
        """The computations that run as part of this instruction; those applied to elements are left out."""
        names = []
        for attribute in ("calls", "body", "branch_computations", "true_computation", "false_computation"):
            text = self.attribute(attribute)
            names += [part.strip("{}% ") for part in text.split(",")] if text else []
        if self.opcode in ("call", "call-start") and (text := self.attribute("to_apply")):
            names.append(text.lstrip("%"))
        return tuple(names)


class Computation:
    """A named sequence of instructions.

    Attributes:
        name: Its name.
        instructions: Its instructions by name.
        root: The instruction whose result is the computation's.
    """

    def __init__(self, name: str, instructions: Iterable[Instruction]) -> None:
        """Indexes the instructions by name."""
        self.name = name
        self.instructions = {one.name: one for one in instructions}
        self.root = next((one for one in self.instructions.values() if one.root), None)

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        """The parameters by number."""
        return {int(one.arguments): one for one in self.instructions.values() if one.opcode == "parameter"}

    @cached_property
    def users(self) -> dict[str, list[tuple[Instruction, int]]]:
        """For each instruction, the instructions that use it, and as which operand."""
        users: dict[str, list[tuple[Instruction, int]]] = {name: [] for name in self.instructions}
        for one in self.instructions.values():
            for position, operand in enumerate(one.operands):
                if operand in users:
                    users[operand].append((one, position))
        return users


@dataclass(frozen=True)
class Module:
    """A compiled program: its computations by name, and the one that runs first."""

    computations: dict[str, Computation]
    entry: Computation


def parse(text: str) -> Module:
    """Parses the text of a compiled program.

    Raises:
        UserError: The text has no entry computation, or a line that is no instruction.
    """
    computations: dict[str, Computation] = {}
    entry = None
    name: str | None = None
    lines: list[str] = []
    for line in text.splitlines():
        if name is None:
            header = _HEADER.match(line)
            if header:
                name, lines = header.group(2), []
                if header.group(1):
                    entry = name
        elif _END.match(line):
            computations[name] = Computation(name, map(_instruction, lines))
            name = None
        elif _NAMED.match(line):
            lines.append(line)
        elif lines:
            # The metadata of kernels may contain line breaks.
            lines[-1] += line
    if entry is None:
        raise UserError("no ENTRY computation in the compiled program's text")
    return Module(computations, computations[entry])


def _instruction(line: str) -> Instruction:
    named = _NAMED.match(line)
    if named is None:
        raise UserError(f"no instruction of a compiled program: {line.strip()[:100]}")
    at = named.end()
    type_end = _closing(line, at) if line[at] == "(" else line.index(" ", at)
    opening = line.index("(", type_end)
    closing = _closing(line, opening)
    arguments = line[opening + 1 : closing - 1]
    opcode = line[type_end:opening].strip()
    return Instruction(
        name=named.group(2),
        arrays=tuple(_array(*found) for found in _ARRAY.findall(_without_comments(line[at:type_end]))),
        opcode=opcode,
        operands=() if opcode in ("constant", "parameter") else tuple(_OPERAND.findall(arguments)),
        arguments=arguments,
        attributes=line[closing:],
        root=bool(named.group(1)),
    )


def _array(dtype: str, dims: str, layout: str) -> ArrayType:
    sizes = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
    return ArrayType(dtype, sizes, not _FAST_MEMORY.search(layout))


def _closing(line: str, opening: int) -> int:
    """Returns the index behind the parenthesis that closes the one at `opening`."""
    depth = 0
    for index in range(opening, len(line)):
        if line[index] == "(":
            depth += 1
        elif line[index] == ")":
            depth -= 1
            if depth == 0:
                return index + 1
    raise UserError(f"parentheses do not match: {line.strip()[:100]}")


def _without_comments(text: str) -> str:
    return re.sub(r"/\*.*?\*/", "", text)
