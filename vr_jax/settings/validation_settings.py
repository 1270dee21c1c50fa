"""The settings of what is measured on held-out data while a run trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

from vr_jax.fields import Config, NoEffect, NonNegativeInt, PositiveInt, Text
from vr_jax.settings.data_settings import SourceSettings

# The metric that is the mean loss of the targets; every other one scores replies.
LOSS: Final = "loss"


@dataclass(frozen=True, kw_only=True)
class ValidationSettings(Config):
    """One number that is measured on held-out data every so many updates (docs/train.md#validation).

    It appears as `validation/<name>/<metric>` in the metrics of the update.

    Attributes:
        source: The samples, or the data of a benchmark.
        every: Updates from one measurement to the next. The last update of the run is always measured.
        batches: Batches that are measured, from the first sample on; 0 measures all. A batch of "loss" stands for as
            many samples as a micro-batch of the training has rows; one of another metric has `batch_size` questions.
        metric: "loss", the mean loss of the targets in nats; the name of a benchmark, whose data `source` names; or
            how the replies to questions of one's own are scored (docs/evaluate.md#your-own-questions).
        batch_size: Questions that are answered together.
        max_new_tokens: Largest number of tokens of an answer. None is the benchmark's own.
    """

    no_effect: ClassVar = (
        NoEffect(("batch_size", "max_new_tokens"), "metric", lambda own: own.metric == LOSS, "no question is answered"),
    )

    source: SourceSettings
    every: PositiveInt = 500
    batches: NonNegativeInt = 0
    metric: Text = LOSS
    batch_size: PositiveInt = 16
    max_new_tokens: PositiveInt | None = None

    def metric_name(self, name: str) -> str:
        """Returns what the number is called in the metrics of a run.

        Args:
            name: The name of these settings.
        """
        return f"validation/{name}/{self.metric}"
