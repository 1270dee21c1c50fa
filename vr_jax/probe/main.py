"""What `vr-jax probe` runs: a checkpoint and Tiny-ImageNet, from flags and an optional config file."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from vr_jax.data.demo.tokenizer import demo_tokenizer
from vr_jax.data.processor import Processor
from vr_jax.evaluation.evaluate import fingerprint
from vr_jax.inference import Loaded, load_for_inference
from vr_jax.model.config import VlmConfig
from vr_jax.model_directory import read_config, warm_start
from vr_jax.probe import tiny_imagenet
from vr_jax.probe.errors import ProbeError
from vr_jax.probe.images import Reader
from vr_jax.probe.results import RESULTS, ProbeResult, TapResult, write_results
from vr_jax.probe.taps import QUESTION, Tap, default_layers, one_tile, prompt_batch, taps_of
from vr_jax.probe.tiny_imagenet import TinyImageNet, subset
from vr_jax.probe.training import Fit, FitOptions, fit
from vr_jax.settings import TrainConfig
from vr_jax.sharding import make_mesh
from vr_jax.storage import results_folder

FIGURE = "probe.svg"
DEMO = "demo"  # `tokenizer` of a config
TITLES = {"vision_remember": "Vision Remember", "deepstack": "DeepStack", "sva": "SVA"}
NOTES = (
    "Everything but the heads is frozen. One tile per image, squashed to the encoder's size (bicubic); prefill only.",
    "All heads have one width; seeds differ in a head's initial weights and see the same batches in the same order.",
    "A layer's tap is the residual stream; the final norm is applied to none of them, not even to the last layer's.",
    "Where a re-fusion block acts after a layer, 'layer N' is before it acts and 'layer N + refusion' after it.",
)

logger = logging.getLogger("vr_jax.probe")


@dataclass(frozen=True, kw_only=True)
class ProbeOptions(FitOptions):
    """What to probe, and how. The defaults are those of methods.md 7."""

    checkpoint: Path | None = None
    data: Path | None = None
    output: Path | None = None  # default: <checkpoint>/probe
    random: bool = False  # random weights: to try the probe out, or as a control
    layers: tuple[int, ...] | None = None  # decoder layers, counted from 1; None: 1, 4, 8, ... and the last
    question: str = QUESTION
    train_images: int = 20_000  # of every class equally many; 0: all
    val_images: int = 0
    dtype: str | None = None  # of parameters and activations of the model; the heads are float32
    label: str | None = None  # names the model in plots
    overwrite: bool = False
    workers: int = 8  # threads that read images
    tokenizer: str = ""  # the config's
    model: VlmConfig | None = None  # default: the checkpoint's config.json
    mesh: Mapping[str, Any] = field(default_factory=dict)  # of `make_mesh`

    def __post_init__(self):
        super().__post_init__()
        for name, least in (("train_images", 0), ("val_images", 0), ("workers", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ProbeError(f"{name} = {value!r}: expected an integer of at least {least}")


def options_of(flags: Mapping[str, Any], config: TrainConfig | None) -> ProbeOptions:
    """Flags that are set (not None) win over the config's `probe` section, which wins over the defaults; its `model`,
    `mesh` and `tokenizer` are taken as they are. The checkpoint of a config is not what the flag --random is about: its
    model is. Raises ProbeError for what is missing."""
    section = {} if config is None else config.probe.to_dict()
    values = {name: value for name, value in section.items() if value is not None} | {
        name: value for name, value in flags.items() if value is not None
    }
    if flags.get("random") and flags.get("checkpoint") is None and config is not None:
        values.pop("checkpoint", None)
    for name in ("checkpoint", "data", "output"):
        if values.get(name) is not None:
            values[name] = Path(values[name])
    if values.get("layers") is not None:
        values["layers"] = _numbers(values["layers"])
    if config is not None:
        values |= {"model": config.model, "mesh": config.mesh.to_dict(), "tokenizer": config.tokenizer}
    options = ProbeOptions(**values)
    if options.data is None:
        raise ProbeError("--data is missing: the folder of tiny-imagenet-200, or of `vr-jax probe stand_in`")
    if options.checkpoint is None and not options.random:
        raise ProbeError("--checkpoint is missing: a model directory; or --random, to try it out with random weights")
    if options.checkpoint is None and (options.model is None or options.output is None):
        raise ProbeError("--random without --checkpoint needs a --config with a model, and --output")
    return options


def run(options: ProbeOptions, *, progress: bool = True) -> ProbeResult:
    """Trains the heads and writes `results.json`, at the end. Raises ProbeError or UserError; OSError if the results cannot be written, before the training where that can be known."""
    begin = time.perf_counter()
    assert options.data is not None
    config = _model_config(options)  # a wrong checkpoint is reported before the data is read
    taps, left_out = taps_of(config, options.layers or default_layers(config.decoder.num_layers))
    data = tiny_imagenet.read(options.data)
    train = subset(data.train, min(options.train_images, len(data.train)), options.data_seed)
    val = subset(data.val, min(options.val_images, len(data.val)), options.data_seed)
    data = dataclasses.replace(data, train=train, val=val)
    mesh = make_mesh(**options.mesh)
    with results_folder(output_of(options), RESULTS, overwrite=options.overwrite):
        loaded = _load(options, config, mesh)
        reader = Reader(data.folder, config.image, options.workers)
        prompt = prompt_batch(loaded.processor, options.question)
        classes = len(data.classes)
        with jax.set_mesh(mesh):
            found = fit(loaded.model, prompt, taps, reader, train, val, classes, options, mesh, progress=progress)
        result = ProbeResult(
            label=options.label or default_label(config, options.random),
            settings=_settings(options, config, data),
            taps=_tap_results(taps, found, len(val)),
            left_out=left_out,
            unreadable={
                name: {one.name: reader.unreadable[one.name] for one in split if one.name in reader.unreadable}
                for name, split in (("train", train), ("val", val))
            },
            notes=NOTES,
            run={
                "devices": f"{mesh.size} x {jax.devices()[0].device_kind}",
                "jax": jax.__version__,
                "seconds": round(time.perf_counter() - begin, 1),
            },
        )
        write_results(output_of(options), result)
    return result


def output_of(options: ProbeOptions) -> Path:
    """Where results and figure go."""
    return options.output or (options.checkpoint or Path()) / "probe"


def default_label(config: VlmConfig, random: bool = False) -> str:
    """E.g. "pool 1/9 + Vision Remember"."""
    projector, refusion = config.projector, config.refusion
    label = projector.name if projector.stride == 1 else f"{projector.name} 1/{projector.stride**2}"
    if refusion is not None:
        label += f" + {TITLES.get(refusion.name, refusion.name)}"
    return label + (" (random weights)" if random else "")


def _model_config(options: ProbeOptions) -> VlmConfig:
    saved = read_config(options.checkpoint) if options.checkpoint else None
    config = options.model or saved
    assert config is not None
    if saved is not None:
        same_way = dataclasses.replace(config, dtype=saved.dtype, attention=saved.attention, remat=saved.remat)
        if same_way != saved:
            logger.warning("config.model differs from %s/config.json and is used instead", options.checkpoint)
    if config.pruning is not None:
        raise ProbeError(f"model.pruning = {config.pruning.name!r}: the probe needs every vision token; leave it out")
    return one_tile(dataclasses.replace(config, dtype=options.dtype or config.dtype))  # type: ignore[arg-type]


def _load(options: ProbeOptions, config: VlmConfig, mesh: jax.sharding.Mesh) -> Loaded:
    if not options.random:
        assert options.checkpoint is not None
        return load_for_inference(options.checkpoint, mesh, config=config, dtype=options.dtype)
    place = options.checkpoint or options.tokenizer
    if not place:
        raise ProbeError("--random needs a tokenizer: set config.tokenizer to its directory, or to 'demo'")
    processor = Processor(demo_tokenizer(), config) if place == DEMO else load_processor(Path(place), config)
    model, _ = warm_start([], config, mesh, dtype=options.dtype)
    return Loaded(model, processor)


def _tap_results(taps: tuple[Tap, ...], found: Fit, images: int) -> tuple[TapResult, ...]:
    return tuple(
        TapResult(
            name=tap.name,
            kind=tap.kind,
            layer=tap.layer,
            what=tap.what,
            tokens=found.shapes[tap.name][0],
            width=found.shapes[tap.name][1],
            accuracies=tuple(float(count) / images for count in found.correct[tap.name]),
            losses=tuple(map(float, found.losses[tap.name])),
        )
        for tap in taps
    )


def _settings(options: ProbeOptions, config: VlmConfig, data: TinyImageNet) -> dict[str, Any]:
    heads = {one.name: getattr(options, one.name) for one in dataclasses.fields(FitOptions)}
    return {
        "checkpoint": {
            "path": str(options.checkpoint) if options.checkpoint else None,
            "sha256": None if options.random or not options.checkpoint else fingerprint(options.checkpoint),
            "random": options.random,
        },
        "model": config.to_dict(),
        "question": options.question,
        "data": {
            "path": str(options.data),
            "classes": len(data.classes),
            "train": len(data.train),
            "val": len(data.val),
            "sha256": data.fingerprint,
        },
        "heads": heads,
    }


def _numbers(value: Any) -> tuple[int, ...]:
    parts = value.split(",") if isinstance(value, str) else [value] if isinstance(value, int) else list(value)
    try:
        return tuple(int(part) for part in parts)
    except (TypeError, ValueError):
        raise ProbeError(f"layers {value!r}: expected numbers with commas between, e.g. 1,4,8") from None
