"""Samples that cannot be used: the reasons, and the statistics that stop a run with too many of them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from vr_jax.data.types import HostBatch, Skip
from vr_jax.errors import EXIT_TOO_MANY_SKIPS, UserError

SkipReason = Literal[
    "malformed_record",  # A field is absent or has a wrong type.
    "unknown_role",  # A message has a speaker that is not known.
    "empty_conversation",  # There is no message, or none of the user.
    "no_answer",  # There is no message of the assistant, so there is nothing to learn.
    "wrong_template",  # The template `plain` needs one image, one user turn and one assistant turn.
    "image_count",  # The numbers of images and of placeholders differ.
    "missing_image",  # The image file does not exist or cannot be read.
    "outside_folder",  # The image path leads out of the image folder.
    "broken_image",  # The image file is damaged or is not an image.
    "image_too_large",  # The image has more pixels than allowed, as a decompression bomb has.
    "too_long",  # The sample has more tokens than a row of the batch.
    "too_many_tiles",  # The sample has more tiles than a row of the batch.
]
REASONS: tuple[str, ...] = get_args(SkipReason)

logger = logging.getLogger("vr_jax.data")


class SkipRecord(Exception):  # It is a signal to the pipeline and never reaches the user as an error.
    """Signals that one sample cannot be used; the pipeline turns it into a `Skip` and goes on.

    Attributes:
        reason: One of `REASONS`.
        detail: What was found and what was expected.
    """

    def __init__(self, reason: SkipReason, detail: str):
        """Stores the reason and the detail; the text of the exception contains both."""
        super().__init__(f"{reason}: {detail}")
        self.reason: SkipReason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[SkipRecord], tuple[SkipReason, str]]:
        """Makes the exception picklable, so that it can come from a worker process."""
        return SkipRecord, (self.reason, self.detail)

    def as_skip(self, record_id: str) -> Skip:
        """Returns the `Skip` of the sample with this id; line breaks in the detail become spaces."""
        return Skip(record_id, self.reason, " ".join(self.detail.split()))


class TooManySkips(UserError):  # The name states the situation, as that of `StopIteration` does.
    """More samples were skipped than the settings allow; the message lists them by reason."""

    exit_code = EXIT_TOO_MANY_SKIPS


def summary(skips: Iterable[Skip], *, per_reason: int = 20) -> str:
    """Lists skipped samples grouped by reason, one line per sample.

    Args:
        skips: The skipped samples.
        per_reason: The number of samples that are listed for each reason; the others are counted.
    """
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
    """Counts the samples that the batches used and skipped, and logs every skipped sample once.

    Attributes:
        max_fraction: The largest fraction of skipped samples that `check` accepts.
        min_samples: The number of samples, used or skipped, below which `check` accepts everything.
        used: The number of samples in the batches so far.
        counts: The number of skipped samples by reason.
        named: The skipped samples that were logged, by id.
    """

    max_fraction: float = 0.01
    min_samples: int = 100
    used: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    named: dict[str, Skip] = field(default_factory=dict)

    @property
    def skipped(self) -> int:
        """The number of skipped samples so far."""
        return sum(self.counts.values())

    @property
    def fraction(self) -> float:
        """The fraction of all samples so far that were skipped."""
        return self.skipped / max(1, self.used + self.skipped)

    def update(self, batch: HostBatch) -> None:
        """Counts the samples of a batch and the samples that were skipped before it.

        A sample that is skipped again in a later epoch counts again but is not logged again.
        """
        self.used += sum(len(row) for row in batch.record_ids)
        for skip in batch.skipped:
            self.counts[skip.reason] += 1
            if skip.id not in self.named:
                self.named[skip.id] = skip
                logger.warning("Skipped sample %s (%s): %s", skip.id, skip.reason, skip.detail)

    def check(self, *, final: bool = False) -> None:
        """Raises an error if too many samples were skipped.

        Args:
            final: Whether the run is over, in which case `min_samples` does not matter.

        Raises:
            TooManySkips: The fraction of skipped samples is above `max_fraction`.
        """
        enough = final or self.used + self.skipped >= self.min_samples
        if enough and self.fraction > self.max_fraction:
            raise TooManySkips(
                f"{self.skipped} of {self.used + self.skipped} samples could not be used ({self.fraction:.2%}, but at "
                f"most {self.max_fraction:.2%} are allowed). Repair these samples, or allow a larger fraction.\n"
                f"{summary(self.named.values())}"
            )

    def get_state(self) -> dict[str, Any]:
        """Returns the counts and the logged samples as a JSON-safe dictionary for a checkpoint."""
        named = [[s.id, s.reason, s.detail] for s in self.named.values()]
        return {"used": self.used, "counts": dict(self.counts), "named": named}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues from what `get_state` returned."""
        self.used = int(state["used"])
        self.counts = Counter(state["counts"])
        self.named = {item[0]: Skip(*item) for item in state["named"]}
