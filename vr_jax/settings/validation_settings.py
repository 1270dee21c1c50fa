"""The settings of what is measured on held-out data while a run trains."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Final, Literal

from vr_jax.fields import Config, NoEffect, NonNegativeInt, PositiveInt, Text, check
from vr_jax.path_text import OptionalPathsText, OptionalPathText

# The metric that is the mean loss of the targets; every other one scores replies.
LOSS: Final = "loss"


@dataclass(frozen=True, kw_only=True)
class HeldOutSettings(Config):
    """Where held-out samples or questions come from.

    Attributes:
        path: File, folder, glob pattern, or name of a data set on the Hugging Face hub, as in `config.data.path`; of a
            benchmark the folder of its data, where empty downloads them.
        images: Folder that image paths are relative to. When empty, it is the folder of each data file.
        format: Name of the file format. When empty, it follows from the file's name.
        split: Split to read where a folder has several. When empty, it is "validation", or the published split of a
            benchmark.
        follow_links: Whether symbolic links inside the image folder may lead out of it.
    """

    path: OptionalPathsText = ""
    images: OptionalPathText = ""
    format: Literal["", "llava_json", "llava_parquet", "array_record"] = ""
    split: str = ""
    follow_links: bool = False


@dataclass(frozen=True, kw_only=True)
class ValidationSettings(Config):
    """One number that is measured on held-out data every so many updates (docs/validation.md).

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
        NoEffect(
            ("source.format",), "metric", lambda own: own.metric != LOSS, "the file's name tells how questions are read"
        ),
    )

    source: HeldOutSettings = field(default_factory=HeldOutSettings)
    every: PositiveInt = 500
    batches: NonNegativeInt = 0
    metric: Text = LOSS
    batch_size: PositiveInt = 16
    max_new_tokens: PositiveInt | None = None

    def __post_init__(self) -> None:
        """Checks the fields, and that a loss has samples."""
        super().__post_init__()
        check(
            self.metric != LOSS or bool(self.source.path),
            "ValidationSettings.source.path is not set: give the held-out samples, e.g. a JSON file, or correct the "
            "name of the measurement",
        )

    def metric_name(self, name: str) -> str:
        """Returns what the number is called in the metrics of a run.

        Args:
            name: The name of these settings.
        """
        return f"validation/{name}/{self.metric}"
