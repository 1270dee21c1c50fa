"""`vr-jax probe`: measures where visual information is lost, from the encoder to the last decoder layer."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated, ClassVar

from vr_jax.cli.flags import Command, Flags, Group, flag
from vr_jax.cli.shared import DType
from vr_jax.compilation import use_compilation_cache
from vr_jax.fields import NoEffect, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Range, Seed
from vr_jax.path_text import FileVariantText, PathText
from vr_jax.plotting import SUFFIXES, MatplotlibMissingError
from vr_jax.probe import (
    CLASS_NAMES,
    FIGURE,
    RESULTS,
    differences,
    draw,
    labels_of,
    output_folder,
    probe_settings,
    read_results,
    run_probe,
    table,
    write_stand_in,
)
from vr_jax.settings import load_config
from vr_jax.settings.overrides import parse_text
from vr_jax.storage import as_path

_SECTIONS = ("model", "mesh", "tokenizer", "probe")  # what this command reads of a config


@dataclass(frozen=True, kw_only=True)
class ProbeFlags(Flags):
    """The flags of `vr-jax probe`. Those that are None leave the choice to the config's `probe` section."""

    no_effect: ClassVar = (
        NoEffect(("overrides",), "config", lambda flags: flags.config is None, "it sets a field of a config; give one"),
    )

    checkpoint: PathText | None = flag(None, "Model directory: what `train`, `convert`, `demo` write.", metavar="DIR")
    data: PathText | None = flag(
        None, "Folder of tiny-imagenet-200, or one that `vr-jax probe stand_in` wrote.", metavar="DIR"
    )
    config: FileVariantText | None = flag(
        None,
        "Config file, or a packaged one. Its model, mesh and probe sections are used, and its tokenizer with --random.",
        metavar="FILE[:VARIANT]",
    )
    overrides: tuple[str, ...] = flag((), "Sets a field of the config.", overrides=True)
    output: PathText | None = flag(
        None, "Folder for results.json and the figure. The default is CHECKPOINT/probe.", metavar="DIR"
    )
    random: bool | None = flag(None, "Use random weights: to try the probe out, or as a control.")
    layers: str | None = flag(
        None, "Decoder layers to probe, counted from 1. The default is 1,4,8,... and the last.", metavar="1,4,8"
    )
    question: str | None = flag(None, "Question about each image. The default is: Describe the image.")
    train_images: NonNegativeInt | None = flag(
        None, "Training images, equally many of each class; 0 takes all. The default is 20000."
    )
    val_images: NonNegativeInt | None = flag(None, "Validation images; 0 takes all, which is the default.")
    epochs: PositiveInt | None = flag(None, "Passes over the training images. The default is 15.")
    batch_size: PositiveInt | None = flag(None, "Images in a batch, over all devices. The default is 256.")
    seeds: PositiveInt | None = flag(None, "Heads for each place that is probed. The default is 3.")
    data_seed: Seed | None = flag(None, "Seed of the choice and the order of the images. The default is 0.")
    lr: PositiveFloat | None = flag(None, "Learning rate of AdamW, with a cosine to 0. The default is 0.001.")
    weight_decay: NonNegativeFloat | None = flag(None, "Weight decay of AdamW. The default is 0.01.")
    width: PositiveInt | None = flag(None, "Width of a head. The default is 512.")
    heads: PositiveInt | None = flag(None, "Attention heads of a head. The default is 8.")
    dtype: DType | None = flag(None, "Type of the model's parameters and activations. The default is the checkpoint's.")
    label: str | None = flag(None, "Name of the model in figures.")
    workers: PositiveInt | None = flag(None, "Threads that read images. The default is 8.")
    overwrite: bool | None = flag(None, "Replace the results in the output folder.")


@dataclass(frozen=True, kw_only=True)
class PlotFlags(Flags):
    """The flags of `vr-jax probe plot`."""

    results: tuple[PathText, ...] = flag(
        help="The results.json of a probe, or the folder that holds it.", positional=True, metavar="RESULTS"
    )
    output: PathText = flag("probe.svg", f"File of the figure: {', '.join(SUFFIXES)}.", metavar="FILE")
    labels: str | None = flag(None, "Names of the lines, with commas between.", metavar="NAMES")


@dataclass(frozen=True, kw_only=True)
class StandInFlags(Flags):
    """The flags of `vr-jax probe stand_in`."""

    folder: PathText = flag(help="Folder to write. It must not exist, or be empty.", positional=True, metavar="DIR")
    classes: Annotated[int, Range(2, len(CLASS_NAMES))] = flag(12, "Number of classes.")
    train: PositiveInt = flag(100, "Training images of each class.")
    val: PositiveInt = flag(25, "Validation images of each class.")
    seed: Seed = flag(0, "Seed of the images.")


def run(flags: ProbeFlags) -> None:
    """Trains the heads, prints the table and draws the figure."""
    use_compilation_cache()
    config = load_config(flags.config, flags.overrides, sections=_SECTIONS) if flags.config else None
    given = {name: value for name, value in vars(flags).items() if name not in ("config", "overrides")}
    if given["layers"] is not None:
        given["layers"] = parse_text(tuple[int, ...], given["layers"], "layers")
    settings = probe_settings(given, config)
    if config is None:
        result = run_probe(settings)
    else:
        result = run_probe(settings, config.model, mesh=config.mesh, tokenizer=config.tokenizer)
    print(table(result))
    output = output_folder(settings)
    try:
        draw([result], output / FIGURE)
    except MatplotlibMissingError as error:
        print(f"vr-jax probe: no figure: {error}", file=sys.stderr)
        print(f"results: {output / RESULTS}")
    else:
        print(f"results: {output / RESULTS}, figure: {output / FIGURE}")


def run_plot(flags: PlotFlags) -> None:
    """Draws the results of several probes into one figure."""
    paths = [as_path(path) for path in flags.results]
    results = [read_results(path) for path in paths]
    for line in differences(results):
        print(f"vr-jax probe plot: careful, the results differ in {line}", file=sys.stderr)
    draw(results, as_path(flags.output), labels_of(results, paths, flags.labels))
    print(flags.output)


def run_stand_in(flags: StandInFlags) -> None:
    """Writes generated images in the layout of Tiny-ImageNet."""
    write_stand_in(as_path(flags.folder), classes=flags.classes, train=flags.train, val=flags.val, seed=flags.seed)
    print(f"{flags.classes} classes, {flags.train} + {flags.val} images each: {flags.folder}")


COMMAND = Group(
    summary="Measure where visual information is lost between the layers.",
    default=Command(
        summary="Measure where visual information is lost between the layers.",
        flags=ProbeFlags,
        run=run,
        details="""Small classifiers are trained on the vision tokens of a frozen model, at the encoder, behind the
        projector and behind decoder layers, to tell the classes of Tiny-ImageNet (the paper's Figure 1b).""",
        examples=("vr-jax probe --checkpoint=runs/phase2/model --data=tiny-imagenet-200",),
        interrupted="interrupted; nothing was written",
    ),
    actions={
        "plot": Command(
            summary="Draw the results of several probes into one figure.",
            flags=PlotFlags,
            run=run_plot,
            examples=("vr-jax probe plot runs/a/model/probe runs/b/model/probe --labels=LLaVA,LLaVA-VR",),
        ),
        "stand_in": Command(
            summary="Write generated images in the layout of Tiny-ImageNet, to try the probe out.",
            flags=StandInFlags,
            run=run_stand_in,
            examples=("vr-jax probe stand_in runs/probe_stand_in",),
        ),
    },
)
