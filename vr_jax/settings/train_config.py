"""The settings of a run as frozen, checked dataclasses.

A config file (`configs/`) makes a ConfigDict with these fields; `TrainConfig.from_config_dict` turns it into a
`TrainConfig` and refuses unknown names, wrong types, numbers outside their declared range and combinations that cannot
work, before anything is opened. Settings that have no effect with others are declared in `no_effect` and refused by
`load_config`, `override` and `replace` (docs/design/decisions.md#decision-30). Inside the package only `TrainConfig`
travels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Self

from ml_collections import ConfigDict

from vr_jax.effects import check_effects
from vr_jax.fields import (
    MIN_FLOAT,
    Config,
    Distinct,
    Fraction,
    NoEffect,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    Seed,
    Text,
    check,
    field_types,
)
from vr_jax.model.config import VlmConfig
from vr_jax.model.registry import read_pruner
from vr_jax.path_text import OptionalPathsText, OptionalPathText, PathsText, PathText
from vr_jax.settings.overrides import change_fields, split_overrides

AxisSize = Annotated[int, Range(-1, 2**20)]
# The decay of a moment is below 1 in float32 too, where 1 - b ** t divides.
Decay = Annotated[float, Range(0, 0.999999)]
Workers = Annotated[int, Range(1, 1024)]
BelowOne = Annotated[float, Range(0, 1, open_high=True)]
Globs = Annotated[tuple[Text, ...], Distinct()]
DEMO = "demo"  # the data format, and the tokenizer, that need no files


@dataclass(frozen=True, kw_only=True)
class DemoDataSettings(Config):
    """The generated images of the format "demo".

    Attributes:
        size: Number of images.
        seed: Seed of all images.
        turns: Questions about an image, as far as it has that many.
    """

    size: PositiveInt = 10_000
    seed: Seed = 0
    turns: PositiveInt = 1


@dataclass(frozen=True, kw_only=True)
class SourceSettings(Config):
    """One of several places that the samples of a run come from (docs/data.md#several-sources).

    Attributes:
        path: File, folder, glob pattern, or name of a data set on the Hugging Face hub; several with commas between.
        images: Folder that image paths are relative to. When empty, it is the folder of each data file.
        format: Name of the file format. When empty, it follows from the file's name.
        split: Split to read where a folder has several.
        follow_links: Whether symbolic links inside the image folder may lead out of it.
    """

    path: PathsText
    images: OptionalPathText = ""
    format: Literal["", "llava_json", "llava_parquet", "array_record"] = ""
    split: str = "train"
    follow_links: bool = False


@dataclass(frozen=True, kw_only=True)
class DataSettings(Config):
    """Which samples a run reads, and how they become batches (docs/data.md).

    The fields from `path` to `follow_links` describe one source, as those of `SourceSettings` do. `sources` takes their
    place where there are several.

    Attributes:
        path: File, folder, glob pattern, or name of a data set on the Hugging Face hub; several with commas between.
        images: Folder that image paths are relative to. When empty, it is the folder of each data file.
        format: Name of the file format. When empty, it follows from the file's name. "demo" generates images as long as
            `path` and `sources` are empty.
        split: Split to read where a folder has several.
        follow_links: Whether symbolic links inside the image folder may lead out of it.
        sources: Several sources, which follow one another as one. Each has its own images, format and split.
        demo: The generated images of the format "demo".
        template: Name of the conversation template.
        label_quirk: Whether the targets are exactly those of LLaVA's code, with its known oddities
            (docs/design/methods.md#labels), rather than the answers only.
        packing: Whether several samples share a row.
        shuffle: Whether the order of the samples is drawn anew for each epoch.
        exif_rotation: Whether images are turned as their EXIF orientation says, which LLaVA does not.
        workers: Processes that decode images and tokenise. With 0, threads of the training process do it.
        allow_changed: Whether a run may continue although the data files changed since its last start.
        max_skipped: Share of unusable samples above which training stops.
        max_pixels: Largest number of pixels of an image. A larger one makes its sample unusable, because it may be a
            small file that fills the memory.
    """

    path: OptionalPathsText = ""
    images: OptionalPathText = ""
    format: Literal["", "llava_json", "llava_parquet", "array_record", "demo"] = ""
    split: str = "train"
    follow_links: bool = False
    sources: tuple[SourceSettings, ...] = ()
    demo: DemoDataSettings = field(default_factory=DemoDataSettings)
    template: Literal["qwen_1_5", "plain"] = "qwen_1_5"
    label_quirk: bool = True
    packing: bool = True
    shuffle: bool = True
    exif_rotation: bool = False
    workers: Annotated[int, Range(0, 1024)] = 4
    allow_changed: bool = False
    max_skipped: Fraction = 0.01
    max_pixels: Annotated[int, Range(1, 178_956_970)] = 89_478_485  # Pillow opens no larger image.

    def __post_init__(self) -> None:
        """Checks the fields, and that one source and several are not both given."""
        super().__post_init__()
        one = {"path": self.path, "images": self.images, "follow_links": self.follow_links}
        one["format"] = "" if self.format == DEMO else self.format
        given = [f"config.data.{name} = {value!r}" for name, value in one.items() if value]
        given += [f"config.data.split = {self.split!r}"] * (self.split != "train")
        check(
            not (self.sources and given),
            f"config.data.sources and {', '.join(given)} are both set; give the fields of each source in "
            "config.data.sources, or leave it empty",
        )

    @property
    def generated(self) -> bool:
        """Whether the samples are the demo's generated images."""
        return self.format == DEMO and not self.path and not self.sources

    @property
    def all_sources(self) -> tuple[SourceSettings, ...]:
        """The sources of the samples; empty if there is none, or if the samples are generated."""
        if self.sources or not self.path:
            return self.sources
        return (
            SourceSettings(
                path=self.path,
                images=self.images,
                format="" if self.format == DEMO else self.format,
                split=self.split,
                follow_links=self.follow_links,
            ),
        )


@dataclass(frozen=True, kw_only=True)
class BatchSettings(Config):
    """The static shapes of the global batch of one update.

    Attributes:
        rows: Rows of the batch, over all devices and micro-batches.
        tokens: Token slots of a row.
        tiles: Image tile slots of a row.
        accumulation: Micro-batches of an update. Their gradients are summed.
        raise_rows: What is done where the mesh or `accumulation` does not divide `rows`. "refuse" is an error. The
            others raise the rows to the next multiple and `samples_per_step` with them, and name the rule for the
            learning rates: they are kept, multiplied by the factor of the samples, or by its square root.
    """

    rows: PositiveInt = 8
    tokens: PositiveInt = 2048
    tiles: PositiveInt = 10
    accumulation: PositiveInt = 1
    raise_rows: Literal["refuse", "keep_lr", "linear_lr", "sqrt_lr"] = "refuse"

    def __post_init__(self) -> None:
        """Checks the fields, and that they go together."""
        super().__post_init__()
        check(
            self.rows % self.accumulation == 0 or self.raise_rows != "refuse",
            f"config.batch.rows = {self.rows} is not divisible by config.batch.accumulation = {self.accumulation}",
        )


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(Config):
    """AdamW and its learning rate; the defaults are those of LLaVA-NeXT's scripts (Hugging Face's Trainer).

    Attributes:
        lr: Learning rate at the end of the warm-up.
        schedule: "cosine" decays the learning rate to 0 at the last step, "constant" keeps it.
        warmup_ratio: Share of all steps, rounded up, in which the learning rate rises linearly from 0.
        b1: Decay of the first moment.
        b2: Decay of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay. Biases and norm scales are never decayed.
        clip_norm: Largest norm of the gradient of all trained parameters together; a longer one is scaled down.
        lr_groups: Pairs of a glob of parameter paths and the learning rate of what it matches, e.g.
            (("encoder.*", 2e-6),). The first match counts; all other parameters have `lr`.
    """

    lr: PositiveFloat = 1e-3
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_ratio: BelowOne = 0.03
    b1: Decay = 0.9
    b2: Decay = 0.999
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    clip_norm: PositiveFloat = 1.0
    lr_groups: tuple[tuple[Text, NonNegativeFloat], ...] = ()

    def __post_init__(self) -> None:
        """Checks the fields, and that they go together."""
        super().__post_init__()
        globs = [glob for glob, _ in self.lr_groups]
        for i, glob in enumerate(globs):
            check(glob not in globs[:i], f"config.optimizer.lr_groups has {glob!r} twice; drop one, the first counts")

    def warmup_steps(self, total: int) -> int:
        """Returns how many of the updates of a run belong to the warm-up. The only update of a run does not.

        Raises:
            ConfigError: All updates of a run of several would.
        """
        steps = math.ceil(total * self.warmup_ratio) if total > 1 else 0
        check(
            steps < total,
            f"config.optimizer.warmup_ratio = {self.warmup_ratio} makes all {total} updates a warm-up, which never "
            "reaches config.optimizer.lr; lower it, or train for more steps",
        )
        return steps


@dataclass(frozen=True, kw_only=True)
class MeshSettings(Config):
    """Sizes of the device mesh's axes. One of them may be -1: it takes the remaining devices.

    Attributes:
        replica: Copies of the parameters; each computes its own part of the batch.
        fsdp: Devices that share the parameters of a copy and its part of the batch.
        tensor: Devices that share each layer's computation.
    """

    replica: AxisSize = 1
    fsdp: AxisSize = -1
    tensor: AxisSize = 1

    def __post_init__(self) -> None:
        """Checks the fields, and that they go together."""
        super().__post_init__()
        sizes = {"replica": self.replica, "fsdp": self.fsdp, "tensor": self.tensor}
        for axis, size in sizes.items():
            check(size != 0, f"config.mesh.{axis} = 0: expected a positive number, or -1 for the remaining devices")
        check(
            list(sizes.values()).count(-1) <= 1,
            f"config.mesh = {sizes}: at most one axis may be -1, which takes the remaining devices",
        )


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings(Config):
    """When checkpoints are written and which are kept (docs/checkpoints.md).

    Attributes:
        every: Steps from one checkpoint to the next. The last step is always saved.
        keep_last: How many of the newest checkpoints are kept. A run continues from the newest, so there is one.
        keep_best: How many of those with the lowest mean training loss are kept besides.
    """

    every: PositiveInt = 500
    keep_last: PositiveInt = 3
    keep_best: NonNegativeInt = 1


@dataclass(frozen=True, kw_only=True)
class ProfileSettings(Config):
    """Which steps are traced by the profiler into `<workdir>/profile`.

    Attributes:
        first_step: First traced step, counted from 1. With 0, it is the first one of each start of the run.
        steps: Number of traced steps. With 0, nothing is traced.
    """

    no_effect: ClassVar = (
        NoEffect(("first_step",), "steps", lambda own: own.steps == 0, "nothing is traced; set the number of steps"),
    )

    first_step: NonNegativeInt = 0
    steps: NonNegativeInt = 0


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(Config):
    """What eval.py does where its flags do not say otherwise (docs/evaluate.md).

    Attributes:
        checkpoint: Model directory to evaluate.
        benchmark: Names of benchmarks, separated by commas, or "all" for those of the paper.
        data: Data of the one benchmark, or a folder with a folder for each. None downloads them.
        output: Folder of the results. None is `<checkpoint>/eval`.
        split: Split of the benchmark. None is the published one.
        profile: Name of the prompts and settings of the benchmarks.
        limit: Number of items that are answered, from the first on. None is all of them.
        batch_size: Prompts that are answered together.
        max_new_tokens: Largest number of tokens of an answer. None is the benchmark's own.
        repetition_penalty: Penalty for tokens that occurred. None is that of the checkpoint's generation_config.json.
        dtype: Type of parameters and activations. None keeps that of the model directory.
        overwrite: Whether results in the output folder are replaced.
        report_items: Items that the HTML report shows. With 0, no report is written.
        pruning: A pruner's name, or its fields as a mapping or as JSON text. None switches none on.
    """

    checkpoint: PathText | None = None
    benchmark: Text | None = None
    data: PathText | None = None
    output: PathText | None = None
    split: Text | None = None
    profile: Text = "default"
    limit: PositiveInt | None = None
    batch_size: PositiveInt = 16
    max_new_tokens: PositiveInt | None = None
    repetition_penalty: PositiveFloat | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    overwrite: bool = False
    report_items: NonNegativeInt = 500
    pruning: Text | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        """Checks the fields, those of the pruner among them."""
        super().__post_init__()
        read_pruner(self.pruning, "config.eval.pruning")


@dataclass(frozen=True, kw_only=True)
class ProbeSettings(Config):
    """What the linear probe does where its flags do not say otherwise (docs/probe.md).

    Attributes:
        checkpoint: Model directory to probe.
        data: Folder of Tiny-ImageNet.
        output: Folder of the results. None is `<checkpoint>/probe`.
        random: Whether the model has random weights, as a control.
        layers: Decoder layers that are probed, counted from 1. None is 1, 4, 8, ... and the last.
        question: Text of the prompt. None is the probe's own question.
        train_images: Training images, equally many of every class. With 0, all of them.
        val_images: Validation images. With 0, all of them.
        dtype: Type of the model's parameters and activations. None keeps that of the model directory.
        label: Name of the model in plots.
        overwrite: Whether results in the output folder are replaced.
        workers: Threads that read images.
        width: Width of a head's query and attention.
        heads: Attention heads of a probe head.
        lr: Learning rate of the heads.
        weight_decay: Decoupled weight decay of the heads.
        epochs: Epochs of the heads' training.
        batch_size: Images of an update, over all devices.
        seeds: Heads at each tap, which differ in their initial weights.
        data_seed: Seed of the choice and the order of the images.
    """

    checkpoint: PathText | None = None
    data: PathText | None = None
    output: PathText | None = None
    random: bool = False
    layers: Annotated[tuple[PositiveInt, ...], Distinct()] | None = None
    question: Text | None = None
    train_images: NonNegativeInt = 20_000
    val_images: NonNegativeInt = 0
    dtype: Literal["float32", "bfloat16"] | None = None
    label: Text | None = None
    overwrite: bool = False
    workers: Workers = 8
    width: PositiveInt = 512
    heads: PositiveInt = 8
    lr: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.01
    epochs: PositiveInt = 15
    batch_size: PositiveInt = 256
    seeds: PositiveInt = 3
    data_seed: Seed = 0

    def __post_init__(self) -> None:
        """Checks the fields, and that they go together."""
        super().__post_init__()
        check(self.layers != (), "config.probe.layers is empty: give layers, or None for 1, 4, 8, ... and the last")
        check(
            self.width % self.heads == 0,
            f"config.probe.width = {self.width} is not divisible by config.probe.heads = {self.heads}",
        )


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
        frozen_dtype: Type of the frozen parameters.
        optimizer: The optimizer and its learning rate.
        loss_chunk: Positions of one device whose logits exist at a time.
        seed: Seed of the initial parameters and of the order of the data.
        mesh: The device mesh.
        checkpoint: When checkpoints are written and which are kept.
        tensorboard: Whether TensorBoard files are written beside `metrics.jsonl`.
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
            ("allow_unused", "allow_different"),
            "init_from",
            lambda run: not run.init_from,
            "no parameters are read; name the model directories to read",
        ),
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
    frozen_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    loss_chunk: PositiveInt = 1024
    seed: Seed = 0
    mesh: MeshSettings = field(default_factory=MeshSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    tensorboard: bool = True
    profile: ProfileSettings = field(default_factory=ProfileSettings)
    eval: EvaluationSettings = field(default_factory=EvaluationSettings)
    probe: ProbeSettings = field(default_factory=ProbeSettings)

    def __post_init__(self) -> None:
        """Checks the fields, and that they go together."""
        super().__post_init__()
        check(bool(self.trainable), "config.trainable is empty: nothing would be trained")
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

    def _check_samples(self) -> None:
        """Checks that the rows of a batch can hold samples, and as many as `samples_per_step` says."""
        batch, image = self.batch, self.model.image
        tiles = 1 + min(columns * rows for columns, rows in image.grids) if image.is_anyres else 1
        check(
            batch.tiles >= tiles,
            f"config.batch.tiles = {batch.tiles} holds no image: one has {tiles} tiles or more "
            f"(config.model.image.aspect_ratio = {image.aspect_ratio!r}); set at least {image.max_tiles_per_image}, "
            "the tiles of the largest grid",
        )
        check(
            batch.tokens > self.model.cells_per_tile,
            f"config.batch.tokens = {batch.tokens} holds no image and its text: a tile has "
            f"{self.model.cells_per_tile} vision tokens; raise it",
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
