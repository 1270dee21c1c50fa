"""States goals as numbers, and whether a run reached them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Goal:
    """One goal.

    Attributes:
        what: The measured quantity.
        relation: "<=" or ">=".
        bound: The number to reach.
        found: The measured number, or None where nothing was measured.
    """

    what: str
    relation: str
    bound: float
    found: float | None

    @property
    def reached(self) -> bool | None:
        """Whether the goal is reached, or None where nothing was measured."""
        if self.found is None:
            return None
        return self.found <= self.bound if self.relation == "<=" else self.found >= self.bound

    def to_dict(self) -> dict[str, Any]:
        """The fields, and whether the goal is reached, for JSON."""
        return dataclasses.asdict(self) | {"reached": self.reached}


def goals_of(rows: Iterable[tuple[str, str, float, float | None]]) -> list[Goal]:
    """Goals from rows of (what, relation, bound, found)."""
    return [Goal(*row) for row in rows]


def lines_of(goals: Iterable[Goal]) -> list[str]:
    """One line of text for each goal."""
    verdicts = {True: "reached", False: "MISSED", None: "not measured"}
    return [
        f"goal {goal.what} {goal.relation} {goal.bound:g}: "
        + (verdicts[goal.reached] if goal.found is None else f"{goal.found:.2f}, {verdicts[goal.reached]}")
        for goal in goals
    ]
