"""A whole probe: from a model directory and Tiny-ImageNet to `results.json`."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping
from typing import Any

import jax

from vr_jax.data.demo.tokenizer import demo_tokenizer
from vr_jax.data.processor import Processor
from vr_jax.errors import UserError
from vr_jax.evaluation import fingerprint
from vr_jax.hub import is_hub_name, local_folder
from vr_jax.inference import Loaded, load_for_inference, load_processor
from vr_jax.model.config import VlmConfig
from vr_jax.model_directory import read_config, warm_start
from vr_jax.probe import tiny_imagenet
from vr_jax.probe.images import Reader
from vr_jax.probe.results import RESULTS, ProbeResult, TapResult, write_results
from vr_jax.probe.taps import QUESTION, Tap, default_layers, one_tile, prompt_batch, taps_of
from vr_jax.probe.tiny_imagenet import TinyImageNet, subset
from vr_jax.probe.training import HEAD_SETTINGS, Fit, fit
from vr_jax.settings import MeshSettings, ProbeSettings, TrainConfig
from vr_jax.sharding import make_mesh
from vr_jax.storage import Path, as_path, results_folder

FIGURE = "probe.svg"
# This value of `TrainConfig.tokenizer` stands for the generated tokenizer of the demo.
DEMO_TOKENIZER = "demo"
TITLES = {"vision_remember": "Vision Remember", "deepstack": "DeepStack", "sva": "SVA"}
NOTES = (
    "Everything except the heads is frozen. Each image is one tile, resized to the encoder's size with PIL's bicubic "
    "filter. The model only prefills the prompt.",
    "All heads have the same width. Seeds differ in the initial weights of a head and use the same batches in the same "
    "order.",
    "The tap of a layer is its residual stream. The final norm is applied to no tap, not even at the last layer.",
    "Where a re-fusion block acts after a layer, 'layer N' is the stream before it acts, and 'layer N + NAME' is the "
    "stream after it acted.",
)

logger = logging.getLogger("vr_jax.probe")


def probe_settings(flags: Mapping[str, Any], config: TrainConfig | None = None) -> ProbeSettings:
    """Combines the flags of a command with the `probe` section of a config file.

    A flag wins over the section. With `random` among the flags and no checkpoint, the checkpoint of the section is
    dropped: random weights are then those of the config's model.

    Args:
        flags: Fields of `ProbeSettings` by name; None leaves the choice to the section.
        config: The settings of the config file, if one is given.

    Raises:
        ConfigError: A field has a value that it cannot have.
    """
    section = ProbeSettings() if config is None else config.probe
    given = {name: value for name, value in flags.items() if value is not None}
    if given.get("random") and "checkpoint" not in given and config is not None:
        given["checkpoint"] = None
    return dataclasses.replace(section, **given)


def output_folder(settings: ProbeSettings) -> Path:
    """Returns the folder of the results and the figure: `output`, or by default `<checkpoint>/probe`.

    Raises:
        UserError: The settings have neither an output folder nor a checkpoint.
    """
    if settings.output is not None:
        return as_path(settings.output, "output")
    if settings.checkpoint is None:
        raise UserError("There is no output folder: set --output, because there is no --checkpoint to put it into.")
    if is_hub_name(settings.checkpoint):
        raise UserError(
            f"{settings.checkpoint} is fetched from the Hugging Face hub: set --output to a folder for results."
        )
    return as_path(settings.checkpoint, "checkpoint") / "probe"


def run_probe(
    settings: ProbeSettings,
    model: VlmConfig | None = None,
    *,
    mesh: MeshSettings | None = None,
    tokenizer: str = "",
    progress: bool = True,
) -> ProbeResult:
    """Trains the heads on a frozen model and writes `results.json` at the end.

    Args:
        settings: What is probed and how; `data`, and `checkpoint` or `random`, are needed.
        model: The config of the model; by default that of the checkpoint.
        mesh: The sizes of the mesh axes; by default all devices share the parameters.
        tokenizer: The directory of the tokenizer, or "demo"; it matters only for random weights without a checkpoint.
        progress: Whether a progress bar is shown.

    Raises:
        UserError: Settings are missing or wrong, the model or the data cannot be read, the results cannot be written,
            or the training fails. Whatever can be checked before the training is checked before it.
    """
    begin = time.perf_counter()
    data_folder = _check_settings(settings, model)
    folder = output_folder(settings)
    if settings.checkpoint is not None:
        settings = dataclasses.replace(settings, checkpoint=str(local_folder(settings.checkpoint)))
    config = _model_config(settings, model)
    taps, left_out = taps_of(config, settings.layers or default_layers(config.decoder.num_layers))
    data = tiny_imagenet.read(data_folder)
    train = subset(data.train, min(settings.train_images, len(data.train)), settings.data_seed)
    val = subset(data.val, min(settings.val_images, len(data.val)), settings.data_seed)
    data = dataclasses.replace(data, train=train, val=val)
    devices = make_mesh(**(mesh or MeshSettings()).to_dict())
    with results_folder(folder, RESULTS, FIGURE, overwrite=settings.overwrite):
        loaded = _load(settings, config, tokenizer, devices)
        reader = Reader(data.folder, config.image, settings.workers)
        prompt = prompt_batch(loaded.processor, _question(settings))
        with jax.set_mesh(devices):
            found = fit(loaded.model, prompt, taps, reader, data, settings, devices, progress=progress)
        result = ProbeResult(
            label=settings.label or default_label(config, settings.random),
            settings=_recorded_settings(settings, config, data),
            taps=_tap_results(taps, found, len(val)),
            left_out=left_out,
            unreadable={
                name: {one.name: reader.unreadable[one.name] for one in split if one.name in reader.unreadable}
                for name, split in (("train", train), ("val", val))
            },
            notes=NOTES,
            run={
                "devices": f"{devices.size} x {jax.devices()[0].device_kind}",
                "jax": jax.__version__,
                "seconds": round(time.perf_counter() - begin, 1),
            },
        )
        write_results(folder, result)
    return result


def default_label(config: VlmConfig, random: bool = False) -> str:
    """Returns the name of a model in plots, such as "pool 1/9 + Vision Remember"."""
    projector, refusion = config.projector, config.refusion
    label = projector.name if projector.stride == 1 else f"{projector.name} 1/{projector.stride**2}"
    if refusion is not None:
        label += f" + {TITLES.get(refusion.name, refusion.name)}"
    return label + (" (random weights)" if random else "")


def _check_settings(settings: ProbeSettings, model: VlmConfig | None) -> Path:
    """Checks that nothing is missing, and returns the folder of the data."""
    if settings.data is None:
        raise UserError(
            "--data is missing: give the folder of tiny-imagenet-200, or one that `vr-jax probe stand_in` wrote."
        )
    if settings.checkpoint is None and not settings.random:
        raise UserError(
            "--checkpoint is missing: give a model directory, or try the probe out with random weights (--random)."
        )
    if settings.checkpoint is None and (model is None or settings.output is None):
        raise UserError("--random without --checkpoint needs --config with a model, and --output with a folder.")
    return as_path(settings.data, "data")


def _model_config(settings: ProbeSettings, model: VlmConfig | None) -> VlmConfig:
    """Returns the config of the model that is probed, with one tile per image."""
    saved = read_config(settings.checkpoint) if settings.checkpoint else None
    config = model or saved
    assert config is not None
    if saved is not None:
        comparable = dataclasses.replace(config, dtype=saved.dtype, attention=saved.attention, remat=saved.remat)
        if comparable != saved:
            logger.warning("config.model differs from %s/config.json and is used instead.", settings.checkpoint)
    if config.pruning is not None:
        raise UserError(
            f"config.model.pruning = {config.pruning.name!r}: the probe needs every vision token, so remove the pruner."
        )
    return one_tile(dataclasses.replace(config, dtype=settings.dtype or config.dtype))


def _load(settings: ProbeSettings, config: VlmConfig, tokenizer_place: str, mesh: jax.sharding.Mesh) -> Loaded:
    """Returns the model with its tokenizer, either from the checkpoint or with random weights."""
    if not settings.random:
        assert settings.checkpoint is not None
        return load_for_inference(as_path(settings.checkpoint), mesh, config=config, dtype=settings.dtype)
    place = settings.checkpoint or tokenizer_place
    if not place:
        raise UserError("--random needs a tokenizer: set config.tokenizer to its directory, or to 'demo'.")
    processor = (
        Processor(demo_tokenizer(), config) if place == DEMO_TOKENIZER else load_processor(as_path(place), config)
    )
    model, _ = warm_start([], config, mesh, dtype=settings.dtype)
    return Loaded(model, processor)


def _tap_results(taps: tuple[Tap, ...], found: Fit, images: int) -> tuple[TapResult, ...]:
    """Divides the numbers of right answers by the number of validation images."""
    return tuple(
        TapResult(
            name=tap.name,
            kind=tap.kind,
            layer=tap.layer,
            description=tap.description,
            tokens=found.shapes[tap.name][0],
            width=found.shapes[tap.name][1],
            accuracies=tuple(float(count) / images for count in found.correct[tap.name]),
            losses=tuple(map(float, found.losses[tap.name])),
        )
        for tap in taps
    )


def _question(settings: ProbeSettings) -> str:
    return QUESTION if settings.question is None else settings.question


def _recorded_settings(settings: ProbeSettings, config: VlmConfig, data: TinyImageNet) -> dict[str, Any]:
    """Returns everything that decides the numbers, for `results.json`."""
    checkpoint = settings.checkpoint
    return {
        "checkpoint": {
            "path": checkpoint,
            "sha256": None if settings.random or not checkpoint else fingerprint(as_path(checkpoint)),
            "random": settings.random,
        },
        "model": config.to_dict(),
        "question": _question(settings),
        "data": {
            "path": settings.data,
            "classes": len(data.classes),
            "train": len(data.train),
            "val": len(data.val),
            "sha256": data.fingerprint,
        },
        "heads": {name: getattr(settings, name) for name in HEAD_SETTINGS},
    }
