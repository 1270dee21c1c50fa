"""What is done with each field of a JSON file of transformers or LLaVA.

Such a file says how replies come about, and a field that is passed over in silence changes them. So every field is
read, or has one of the values that this program computes with, or is on a list of fields without a meaning here, or is
refused by its name (docs/design/decisions.md#decision-28).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vr_jax.errors import UserError
from vr_jax.fields import shown

WAY_OUT = "leave it out with `--ignore={name}` if that does not matter to you"


@dataclass(frozen=True)
class FieldTable:
    """The fields that a kind of JSON object may have.

    Attributes:
        honoured: The fields that are read.
        fixed: Fields that may have certain values only, which are those that are computed here. An absent field or None
            stands for the default of the file's class and is accepted.
        without_meaning: Fields that change nothing here, each with the reason.
    """

    honoured: frozenset[str]
    fixed: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    without_meaning: Mapping[str, str] = field(default_factory=dict)

    def check(self, values: Mapping[str, Any], where: str) -> None:
        """Checks every field of an object.

        Args:
            values: The fields of the object.
            where: What the messages call the object, e.g. the path of its file.

        Raises:
            UserError: A field is not known, or has a value that changes what is computed.
        """
        for name, value in values.items():
            if name in self.honoured or name in self.without_meaning:
                continue
            way_out = WAY_OUT.format(name=name)
            if name in self.fixed:
                if value is not None and not any(same(value, one) for one in self.fixed[name]):
                    expected = " or ".join(repr(one) for one in self.fixed[name])
                    raise UserError(
                        f"{where}: {name} = {shown(value)} is not supported, expected {expected}; {way_out}"
                    )
            elif not _empty(value):
                near = difflib.get_close_matches(name, self.known, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise UserError(f"{where}: the field {name!r} = {shown(value)} is not known{hint}; {way_out}")

    @property
    def known(self) -> tuple[str, ...]:
        """All fields of the table."""
        return (*sorted(self.honoured), *self.fixed, *self.without_meaning)

    def extended(self, *others: FieldTable) -> FieldTable:
        """Returns a table with the fields of several ones; what this one says of a field counts."""
        fixed, without_meaning, honoured = dict(self.fixed), dict(self.without_meaning), set(self.honoured)
        for other in others:
            known = {*fixed, *without_meaning, *honoured}
            fixed |= {name: value for name, value in other.fixed.items() if name not in known}
            without_meaning |= {name: why for name, why in other.without_meaning.items() if name not in known}
            honoured |= other.honoured - known
        return FieldTable(frozenset(honoured), fixed, without_meaning)


def same(value: Any, other: Any) -> bool:
    """Returns whether two JSON values are equal; True and 1 are not."""
    return isinstance(value, bool) == isinstance(other, bool) and value == other


def _empty(value: Any) -> bool:
    """Whether a value switches nothing on."""
    return value is None or value is False or value in ("", [], {})
