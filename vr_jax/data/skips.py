"""Samples that cannot be used: the fixed vocabulary of reasons, and the skip statistics that counts them and stops a run."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from vr_jax.data.types import HostBatch, Skip
from vr_jax.errors import EXIT_TOO_MANY_SKIPS, UserError

SkipReason = Literal[
    "malformed_record",  # a field is absent or has the wrong type
    "unknown_role",
    "empty_conversation",
    "no_answer",  # nothing to learn from: no assistant turn
    "wrong_template",  # `plain` needs exactly one image, one human and one assistant turn
    "image_count",  # differs from the number of placeholders
    "missing_image",
    "outside_folder",  # the path leaves the image folder
    "broken_image",
    "image_too_large",  # more pixels than allowed: a decompression bomb
    "too_long",  # more tokens than a row
    "too_many_tiles",  # more tiles than a row
]
REASONS: tuple[str, ...] = get_args(SkipReason)

logger = logging.getLogger("vr_jax.data")


class SkipRecord(Exception):
    """Raised where a sample turns out to be unusable; the pipeline turns it into a `Skip` and goes on."""

    def __init__(self, reason: SkipReason, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason: SkipReason = reason
        self.detail = detail

    def __reduce__(self):
        return SkipRecord, (self.reason, self.detail)

    def as_skip(self, record_id: str) -> Skip:
        return Skip(record_id, self.reason, " ".join(self.detail.split()))


class TooManySkips(UserError):
    """More samples were skipped than allowed; the message lists them by reason."""

    exit_code = EXIT_TOO_MANY_SKIPS


def summary(skips: Iterable[Skip], *, per_reason: int = 20) -> str:
    """One line per skipped sample, grouped by reason, at most `per_reason` of each."""
    groups: dict[str, list[Skip]] = {}
    for skip in skips:
        groups.setdefault(skip.reason, []).append(skip)
    lines = []
    for reason, members in sorted(groups.items()):
        lines.append(f"{reason} ({len(members)}):")
        lines += [f"  {skip.id}: {skip.detail}" for skip in members[:per_reason]]
        if len(members) > per_reason:
            lines.append(f"  ... and {len(members) - per_reason} more")
    return "\n".join(lines)


@dataclass
class SkipStatistics:
    """Counts what the batches report: samples used, samples skipped by reason, each skipped sample logged once.

    max_fraction: `check` raises above this share of skipped samples.
    min_samples: `check` says nothing before so many samples (used or skipped) were met."""

    max_fraction: float = 0.01
    min_samples: int = 100
    used: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    named: dict[str, Skip] = field(default_factory=dict)

    @property
    def skipped(self) -> int:
        return sum(self.counts.values())

    @property
    def fraction(self) -> float:
        return self.skipped / max(1, self.used + self.skipped)

    def update(self, batch: HostBatch) -> None:
        """Counts the samples of a batch and the ones skipped before it; repeats in later epochs count again."""
        self.used += sum(len(row) for row in batch.record_ids)
        for skip in batch.skipped:
            self.counts[skip.reason] += 1
            if skip.id not in self.named:
                self.named[skip.id] = skip
                logger.warning("skipped sample %s (%s): %s", skip.id, skip.reason, skip.detail)

    def check(self, *, final: bool = False) -> None:
        """Raises TooManySkips above `max_fraction`; `final` (the run is over) ignores `min_samples`."""
        enough = final or self.used + self.skipped >= self.min_samples
        if enough and self.fraction > self.max_fraction:
            raise TooManySkips(
                f"{self.skipped} of {self.used + self.skipped} samples could not be used "
                f"({self.fraction:.2%}, allowed {self.max_fraction:.2%}). Repair the data or raise the allowed "
                f"fraction.\n{summary(self.named.values())}"
            )

    def get_state(self) -> dict[str, Any]:
        """JSON-safe counts and names, for a checkpoint."""
        named = [[s.id, s.reason, s.detail] for s in self.named.values()]
        return {"used": self.used, "counts": dict(self.counts), "named": named}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self.used = int(state["used"])
        self.counts = Counter(state["counts"])
        self.named = {item[0]: Skip(*item) for item in state["named"]}
