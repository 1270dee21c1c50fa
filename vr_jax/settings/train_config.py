"""The settings of a run as frozen, checked dataclasses.

A config file (`configs/`) makes a ConfigDict with these fields; `TrainConfig.from_config_dict` turns it into a
`TrainConfig` and refuses unknown names, wrong types, numbers outside their declared range and combinations that cannot
work, before anything is opened. Settings that have no effect with others are declared in `no_effect` and refused by
`load_config`, `override` and `replace` (docs/design/decisions.md#decision-30). Inside the package only `TrainConfig`
travels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Self

from ml_collections import ConfigDict

from vr_jax.effects import check_effects
from vr_jax.fields import (
    MIN_FLOAT,
    Config,
    Distinct,
    NoEffect,
    NonNegativeInt,
    PositiveInt,
    Range,
    Sections,
    Seed,
    Text,
    check,
    field_types,
)
from vr_jax.model.config import QUIRKS, VlmConfig
from vr_jax.path_text import OptionalPathsText, OptionalPathText
from vr_jax.settings.command_settings import EvaluationSettings, ProbeSettings
from vr_jax.settings.data_settings import DEMO, DataSettings
from vr_jax.settings.lora_settings import LoraSettings
from vr_jax.settings.overrides import change_fields, split_overrides
from vr_jax.settings.run_settings import (
    BatchSettings,
    CheckpointSettings,
    MeshSettings,
    OptimizerSettings,
    ProfileSettings,
)
from vr_jax.settings.tracker_settings import TrackerName, TrackioSettings, WandbSettings
from vr_jax.settings.validation_settings import LOSS, ValidationSettings

Globs = Annotated[tuple[Text, ...], Distinct()]


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """All settings of a run.

    Attributes:
        model: The model.
        init_from: Model directories that the parameters are taken from, separated by commas. What none of them holds
            starts random.
        allow_unused: Prefixes of parameter paths in those directories that the model may lack.
        allow_different: Beginnings of the names of fields, e.g. "projector.stride", that `model` may give other values
            than those directories have for the sections whose parameters are taken.
        tokenizer: Directory of the tokenizer, or "demo". When empty, it is the directory of `init_from` that holds the
            decoder.
        data: The training data.
        batch: The static shapes of a batch.
        samples_per_step: Samples that the rows of one update hold on average. It sets the number of updates of an
            epoch, and equals the batch size of a run without packing.
        epochs: Passes over the data.
        steps: Number of updates. With 0, it is `epochs * samples / samples_per_step`, rounded up.
        trainable: Globs of parameter paths (docs/design/architecture.md#parameter-paths). All other parameters are
            frozen.
        lora: Adapters that are trained beside these.
        frozen_dtype: Type of the frozen parameters. "int8" and "nf4" are the types of the kernels of frozen linear
            layers (docs/train.md#lora); all other frozen parameters are then kept in bfloat16.
        optimizer: The optimizer and its learning rate.
        loss_chunk: Positions of one device whose logits exist at a time.
        seed: Seed of the initial parameters and of the order of the data.
        mesh: The device mesh.
        validation: What is measured on held-out data while the run trains, by name.
        checkpoint: When checkpoints are written and which are kept.
        tensorboard: Whether TensorBoard files are written beside `metrics.jsonl`.
        trackers: Names of further trackers.
        wandb: How the run stands in Weights & Biases.
        trackio: How the run stands in trackio.
        profile: Which steps are traced.
        eval: Settings of eval.py.
        probe: Settings of the linear probe.
    """

    no_effect: ClassVar = (
        NoEffect(("epochs",), "steps", lambda run: run.steps > 0, "it sets the number of updates; give one of the two"),
        NoEffect(
            ("data.images", "data.follow_links", "data.max_pixels"),
            "data.format",
            lambda run: run.data.generated,
            "its images are generated; for data of your own set data.path",
        ),
        NoEffect(
            ("data.demo",),
            "data.format",
            lambda run: run.data.format != DEMO,
            "only the format 'demo' generates images",
        ),
        NoEffect(("data.demo",), "data.path", lambda run: bool(run.data.path), "no images are generated"),
        NoEffect(("data.demo",), "data.sources", lambda run: bool(run.data.sources), "no images are generated"),
        NoEffect(
            ("data.label_quirk",),
            "model.template",
            lambda run: run.model.template not in QUIRKS,
            "LLaVA's code has no quirk of the labels for it; leave it out, or set it to False",
        ),
        NoEffect(
            ("allow_unused", "allow_different"),
            "init_from",
            lambda run: not run.init_from,
            "no parameters are read; name the model directories to read",
        ),
        NoEffect(("wandb",), "trackers", lambda run: "wandb" not in run.trackers, "name 'wandb' there"),
        NoEffect(("trackio",), "trackers", lambda run: "trackio" not in run.trackers, "name 'trackio' there"),
    )

    model: VlmConfig
    init_from: OptionalPathsText = ""
    allow_unused: Globs = ()
    allow_different: Globs = ()
    tokenizer: OptionalPathText = ""
    data: DataSettings = field(default_factory=DataSettings)
    batch: BatchSettings = field(default_factory=BatchSettings)
    samples_per_step: PositiveInt = 8
    epochs: Annotated[float, Range(MIN_FLOAT, 1e6)] = 1.0
    steps: NonNegativeInt = 0
    trainable: Globs = ("*",)
    lora: LoraSettings = field(default_factory=LoraSettings)
    frozen_dtype: Literal["float32", "bfloat16", "int8", "nf4"] = "bfloat16"
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    loss_chunk: PositiveInt = 1024
    seed: Seed = 0
    mesh: MeshSettings = field(default_factory=MeshSettings)
    validation: Mapping[str, ValidationSettings] = field(default_factory=Sections)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    tensorboard: bool = True
    trackers: Annotated[tuple[TrackerName, ...], Distinct()] = ()
    wandb: WandbSettings = field(default_factory=WandbSettings)
    trackio: TrackioSettings = field(default_factory=TrackioSettings)
    profile: ProfileSettings = field(default_factory=ProfileSettings)
    eval: EvaluationSettings = field(default_factory=EvaluationSettings)
    probe: ProbeSettings = field(default_factory=ProbeSettings)

    def __post_init__(self) -> None:
        """Checks the fields, and that they go together."""
        super().__post_init__()
        check(
            bool(self.trainable) or self.lora.rank > 0,
            "config.trainable is empty: nothing would be trained, because config.lora.rank = 0",
        )
        if self.steps:
            self.optimizer.warmup_steps(self.steps)
            check(
                self.profile.first_step <= self.steps,
                f"config.profile.first_step = {self.profile.first_step} lies behind the last update: "
                f"config.steps = {self.steps}",
            )
        names = [part.strip() for part in self.init_from.split(",")]
        check(
            not self.init_from or ("" not in names and len(set(names)) == len(names)),
            f"config.init_from = {self.init_from!r}: expected directories, separated by single commas, none twice",
        )
        self._check_samples()
        self._check_best()

    def _check_best(self) -> None:
        """Checks that the number by which the best checkpoints are chosen is measured whenever one is saved."""
        checkpoint = self.checkpoint
        if checkpoint.best == LOSS:
            return
        known = {one.metric_name(name): one for name, one in self.validation.items()}
        check(
            checkpoint.best in known,
            f"config.checkpoint.best = {checkpoint.best!r}: expected one of {', '.join([LOSS, *known])}",
        )
        every = known[checkpoint.best].every
        check(
            checkpoint.every % every == 0,
            f"config.checkpoint.best = {checkpoint.best!r} is measured every {every} updates, and a checkpoint is "
            f"saved every config.checkpoint.every = {checkpoint.every}: make the second a multiple of the first",
        )

    def _check_samples(self) -> None:
        """Checks that the rows of a batch can hold samples, and as many as `samples_per_step` says."""
        batch, image = self.batch, self.model.image
        tiles, tokens = image.min_tiles_per_image, self.model.min_tokens_per_image
        enough = f"{image.max_tiles_per_image}, the tiles of the largest grid"
        if image.aspect_ratio == "native":
            enough = f"{tiles}, better {-(-image.max_pixels // image.tile_size**2)}, the tiles of image.max_pixels"
        check(
            batch.tiles >= tiles,
            f"config.batch.tiles = {batch.tiles} holds no image: one has {tiles} tiles or more "
            f"(config.model.image.aspect_ratio = {image.aspect_ratio!r}); set at least {enough}",
        )
        check(
            batch.tokens > tokens,
            f"config.batch.tokens = {batch.tokens} holds no image and its text: an image has {tokens} vision tokens or "
            "more; raise it",
        )
        check(
            self.data.packing or self.samples_per_step == batch.rows,
            f"config.samples_per_step = {self.samples_per_step} with config.data.packing = False: a row holds one "
            f"sample, so an update has config.batch.rows = {batch.rows}; set both to the same number",
        )

    @classmethod
    def from_config_dict(cls, values: ConfigDict | Mapping[str, Any]) -> Self:
        """Builds the settings from what a config file returns. Absent fields keep their defaults.

        Args:
            values: Fields and sections of this class, by name.

        Raises:
            ConfigError: A name is unknown, a value has the wrong type or is outside its range, or two settings do not
                go together.
        """
        plain = values.to_dict() if isinstance(values, ConfigDict) else dict(values)
        check("model" in plain, "config.model is missing: a config describes a model")
        return cls.from_dict(plain, "config")

    def to_config_dict(self) -> ConfigDict:
        """Returns the settings as a ConfigDict, for a config file that starts from another one's."""
        return ConfigDict(self.to_dict(), convert_dict=True)

    def replace(self, changes: Mapping[str, Any]) -> Self:
        """Returns the settings with some fields changed, checked again.

        Args:
            changes: Values by dotted field name, e.g. {"batch.rows": 16, "model.remat": "full"}.

        Raises:
            ConfigError: A name is unknown, a value cannot be, or a changed setting has no effect with the others.
        """
        return self._changed(list(changes.items()))

    def override(self, overrides: Iterable[str]) -> Self:
        """Returns the settings with some fields changed by the texts of a command line, checked again.

        Choosing a method by name makes its fields settable by the same call, in any order:
        `model.projector.depth=2`, `model.projector.name=perceiver`.

        Args:
            overrides: Texts FIELD=VALUE, e.g. "optimizer.lr=1e-4"; the type of the field says how the value is read.

        Raises:
            ConfigError: A name is unknown, a value cannot be, or a changed setting has no effect with the others.
        """
        return self._changed(split_overrides(overrides))

    def _changed(self, changes: list[tuple[str, Any]]) -> Self:
        config = type(self).from_config_dict(change_fields(type(self), self.to_dict(), changes))
        names = [name for name, _ in changes]
        check_effects(config, given=names)
        before, rows = self.batch.rows, config.batch.rows
        held = round(self.samples_per_step * rows / before)
        check(
            rows == before or config.steps > 0 or "samples_per_step" in names or held == config.samples_per_step,
            f"config.batch.rows = {rows} without config.samples_per_step: {before} rows held {self.samples_per_step} "
            f"samples, so these hold about {held}; give both, because samples_per_step sets the number of updates",
        )
        return config


# The fields that training reads.
TRAINING = tuple(name for name in field_types(TrainConfig) if name not in ("eval", "probe"))
