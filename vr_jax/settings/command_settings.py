"""The settings that other commands than `train` read from a config: those of `eval` and `probe`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from vr_jax.fields import (
    Config,
    Distinct,
    NoEffect,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    Seed,
    Text,
    check,
)
from vr_jax.model.registry import read_pruner
from vr_jax.path_text import PathText

Workers = Annotated[int, Range(1, 1024)]


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(Config):
    """What eval.py does where its flags do not say otherwise (docs/evaluate.md).

    Attributes:
        checkpoint: Model directory to evaluate.
        benchmark: Names of benchmarks, separated by commas; "all" stands for those of the paper, and NAME=FILE or
            NAME=FILE:METRIC for questions of one's own.
        images: Folder of the images of one's own questions. None is that of their file.
        follow_links: Whether symbolic links in the image folder of one's own questions may lead out of it.
        data: Data of the one benchmark, or a folder with a folder for each. None downloads them.
        output: Folder of the results. None is `<checkpoint>/eval`.
        split: Split of the benchmark. None is the published one.
        profile: Name of the prompts and settings of the benchmarks.
        limit: Number of items that are answered, from the first on. None is all of them.
        batch_size: Prompts that are answered together.
        max_new_tokens: Largest number of tokens of an answer. None is the benchmark's own.
        repetition_penalty: Penalty for tokens that occurred. None is that of the checkpoint's generation_config.json.
        dtype: Type of parameters and activations. None keeps that of the model directory.
        weights: How the kernels of linear layers are quantised. None keeps them.
        overwrite: Whether results in the output folder are replaced.
        report_items: Items that the HTML report shows. With 0, no report is written.
        pruning: A pruner's name, or its fields as a mapping or as JSON text. None switches none on.
    """

    no_effect: ClassVar = (
        NoEffect(
            ("images", "follow_links"),
            "benchmark",
            lambda one: one.benchmark is not None and "=" not in one.benchmark,
            "a published benchmark brings its images; name a file of your own, NAME=FILE:METRIC, or leave it out",
        ),
        NoEffect(
            ("data", "split"),
            "benchmark",
            lambda one: (
                one.benchmark is not None and all("=" in name for name in one.benchmark.split(",") if name.strip())
            ),
            "a file of your own is read as it is; leave it out",
        ),
    )

    checkpoint: PathText | None = None
    benchmark: Text | None = None
    images: PathText | None = None
    follow_links: bool = False
    data: PathText | None = None
    output: PathText | None = None
    split: Text | None = None
    profile: Text = "default"
    limit: PositiveInt | None = None
    batch_size: PositiveInt = 16
    max_new_tokens: PositiveInt | None = None
    repetition_penalty: PositiveFloat | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    weights: Literal["int8", "nf4"] | None = None
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
