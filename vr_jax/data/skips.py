"""Samples that cannot be used: the reasons, what helps against each, and the rule that stops a run with too many.

The rule (docs/data.md#too-many-skipped-samples) has three parts, for a limit p of `max_fraction`:

* While samples come, a sequential probability ratio test of p against 2p (at most halfway between p and 1) stops as
  soon as the data are a million times as probable under the larger share. Of data sets whose share is p or less, and
  whose order is random, it stops one in a million, however long they are. With p = 0.01 it takes 20 unusable samples in
  a row, or some 550 samples of which 5 % are unusable.
* After each epoch the share is known, and is compared with p exactly.
* A run that ends before an epoch is over stops where a share of p would give so many unusable samples in less than one
  case in a hundred.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn, get_args

from vr_jax.data.types import HostBatch, Skip
from vr_jax.errors import EXIT_TOO_MANY_SKIPS, UserError

SkipReason = Literal[
    "malformed_record",  # A field is absent or has a wrong type.
    "unknown_role",  # A message has a speaker that is not known.
    "empty_conversation",  # There is no message, or none of the user.
    "no_answer",  # There is no message of the assistant, so there is nothing to learn.
    "wrong_template",  # The template cannot write these messages: `plain` needs one image, one question, one answer.
    "image_count",  # The numbers of images and of placeholders differ.
    "missing_image",  # The image file does not exist or cannot be read.
    "outside_folder",  # The image path leads out of the image folder.
    "broken_image",  # The image file is damaged or is not an image.
    "image_mode",  # The numbers of the image have no known range, so that none of them is known to be white.
    "image_too_large",  # The image has more pixels than allowed, as a decompression bomb has.
    "image_shape",  # The image has no area, or the model has no tiles for a shape so long.
    "too_long",  # The sample has more tokens than a row of the batch.
    "too_many_tiles",  # The sample has more tiles than a row of the batch.
]
REASONS: tuple[str, ...] = get_args(SkipReason)

# What helps against each reason, as the lists of skipped samples say it.
REMEDIES: dict[str, str] = {
    "malformed_record": "repair the records, or leave them out with `vr-jax prepare`",
    "unknown_role": "name the speakers human and gpt, or user and assistant",
    "empty_conversation": "leave these records out with `vr-jax prepare`",
    "no_answer": "leave these records out with `vr-jax prepare`",
    "wrong_template": "choose data.template=chat for conversations, or a model.template that can write them",
    "image_count": "write one <image> for each image",
    "missing_image": "set data.images to the folder that the image names are relative to, or fetch the images",
    "outside_folder": "set data.images to a folder that holds all images, or data.follow_links=true for links",
    "broken_image": "fetch or convert these images anew",
    "image_mode": "convert these images to 8 or 16 bits",
    "image_too_large": "raise data.max_pixels, or shrink these images",
    "image_shape": "crop these images, or leave them out",
    "too_long": "raise batch.tokens, or choose a stronger compression of the images",
    "too_many_tiles": "raise batch.tiles, or lower what an image may have: model.image.max_tiles or max_pixels",
}
LISTED = 20  # samples of each reason that are kept, logged and listed
MAX_DETAIL, MAX_ID = 300, 100  # characters of what is kept of a skipped sample
_SURE = math.log(1e6)  # the logarithm of the likelihood ratio at which the sequential test stops
_UNLIKELY = math.log(100)
CHECK_COMMAND = "`vr-jax prepare --check` reads the whole data set and lists them all"

logger = logging.getLogger("vr_jax.data")


def one_line(text: str, limit: int) -> str:
    """Returns a text as one line of at most `limit` printable characters; the middle of a longer one is left out."""
    text = " ".join(text[: 4 * limit].split() + text[max(4 * limit, len(text) - limit) :].split())
    if len(text) > limit:
        head = (2 * limit) // 3
        text = f"{text[:head]} ... {text[len(text) - (limit - head - 5) :]}"
    return "".join(one if one.isprintable() else "\ufffd" for one in text)


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
        """Returns the `Skip` of the sample with this id; id and detail become lines of bounded length."""
        return Skip(one_line(record_id, MAX_ID), self.reason, one_line(self.detail, MAX_DETAIL))


class TooManySkips(UserError):  # The name states the situation, as that of `StopIteration` does.
    """More samples were skipped than the settings allow; the message lists them by reason."""

    exit_code = EXIT_TOO_MANY_SKIPS


def summary(skips: Iterable[Skip], counts: Mapping[str, int] | None = None, *, per_reason: int = LISTED) -> str:
    """Lists skipped samples grouped by reason, each group with what helps against its reason.

    Args:
        skips: Skipped samples, in their order.
        counts: The number of skipped samples of each reason, where `skips` holds only some of them.
        per_reason: The number of samples that are listed for each reason; the others are counted.
    """
    groups: dict[str, list[Skip]] = {}
    for skip in skips:
        groups.setdefault(skip.reason, []).append(skip)
    totals = {reason: len(members) for reason, members in groups.items()} if counts is None else counts
    lines = []
    for reason, total in sorted(totals.items()):
        listed = groups.get(reason, [])[:per_reason]
        remedy = f"; {REMEDIES[reason]}" if reason in REMEDIES else ""
        lines.append(f"{reason} ({total}){remedy}:")
        lines += [f"  {skip.id}: {skip.detail}" for skip in listed]
        if total > len(listed):
            lines.append(f"  ... and {total - len(listed)} more")
    return "\n".join(lines)


def surely_above(skipped: int, used: int, max_fraction: float) -> bool:
    """Says, while samples come, whether the share of unusable ones is surely above a limit (see the module).

    Args:
        skipped: The number of samples that were skipped so far.
        used: The number of samples that were used so far.
        max_fraction: The limit.
    """
    if max_fraction >= 1 or not skipped:
        return False
    if max_fraction <= 0:
        return True
    other = min(2 * max_fraction, (1 + max_fraction) / 2)
    ratio = skipped * math.log(other / max_fraction) + used * math.log((1 - other) / (1 - max_fraction))
    return ratio >= _SURE


def probably_above(skipped: int, used: int, max_fraction: float) -> bool:
    """Says of the samples of a finished run whether a share of `max_fraction` is an unlikely cause of so many skips.

    The probability is bounded by Chernoff's inequality, exp(-n * KL(skipped / n, max_fraction)).
    """
    count = skipped + used
    if not count or skipped <= max_fraction * count:
        return False
    if max_fraction <= 0:
        return True
    share = skipped / count
    divergence = share * math.log(share / max_fraction)
    if used:
        divergence += (1 - share) * math.log((1 - share) / (1 - max_fraction))
    return count * divergence >= _UNLIKELY


@dataclass
class SkipStatistics:
    """Counts samples that are used and skipped, logs the first skipped samples of each reason, and stops a run.

    Attributes:
        max_fraction: The largest share of skipped samples that is accepted.
        used: The number of samples that were used so far.
        counts: The number of skipped samples by reason.
        examples: The first skipped samples of each reason, by id, which were logged.
    """

    max_fraction: float = 0.01
    used: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, Skip] = field(default_factory=dict)

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
            new = self.add(skip)
            count = self.counts[skip.reason]
            if new:
                logger.warning("Skipped sample %s (%s): %s", skip.id, skip.reason, skip.detail)
            elif count > LISTED and count & (count - 1) == 0:
                logger.warning("Skipped %d samples (%s) so far; %s", count, skip.reason, REMEDIES.get(skip.reason, ""))

    def add(self, skip: Skip) -> bool:
        """Counts a skipped sample, and returns whether it is among the first of its reason and new."""
        self.counts[skip.reason] += 1
        listed = sum(one.reason == skip.reason for one in self.examples.values())
        if skip.id in self.examples or listed >= LISTED:
            return False
        self.examples[skip.id] = skip
        return True

    def check(self, *, final: bool = False) -> None:
        """Raises an error if too many samples were skipped.

        Args:
            final: Whether the run is over, so that a weaker evidence suffices.

        Raises:
            TooManySkips: The share of skipped samples is above `max_fraction` by the rule of this module.
        """
        above = probably_above if final else surely_above
        if above(self.skipped, self.used, self.max_fraction):
            self.refuse()

    def refuse(self) -> NoReturn:
        """Raises the error that lists the skipped samples.

        Raises:
            TooManySkips: Always.
        """
        raise TooManySkips(
            f"{self.skipped} of {self.used + self.skipped} samples could not be used ({self.fraction:.2%}, but at most "
            f"{self.max_fraction:.2%} are allowed, max_skipped). Repair these samples, or allow a larger share; "
            f"{CHECK_COMMAND}.\n{summary(self.examples.values(), self.counts)}"
        )

    def get_state(self) -> dict[str, Any]:
        """Returns the counts and the logged samples as a JSON-safe dictionary for a checkpoint, of bounded size."""
        examples = [[s.id, s.reason, s.detail] for s in self.examples.values()]
        return {"used": self.used, "counts": dict(self.counts), "examples": examples}

    def set_state(self, state: Mapping[str, Any], *, counts: bool = True) -> None:
        """Continues from what `get_state` returned.

        Args:
            state: The counts and the logged samples.
            counts: Whether its counts are continued too, and not only the samples that need not be logged again.
        """
        self.used = int(state["used"]) if counts else 0
        self.counts = Counter(state["counts"]) if counts else Counter()
        self.examples = {item[0]: Skip(*item) for item in state["examples"]}

    def add_state(self, state: Mapping[str, Any]) -> None:
        """Adds what `get_state` of the statistics of other samples returned."""
        self.used += int(state["used"])
        self.counts.update(state["counts"])
        for item in state["examples"]:
            if sum(one.reason == item[1] for one in self.examples.values()) < LISTED:
                self.examples.setdefault(item[0], Skip(*item))
