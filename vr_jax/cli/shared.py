"""Flags that several commands share."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import jax

from vr_jax import distributed
from vr_jax.cli import logs
from vr_jax.cli.flags import Flags, flag
from vr_jax.compilation import use_compilation_cache
from vr_jax.data.processor import Processor
from vr_jax.errors import UserError
from vr_jax.fields import (
    NoEffect,
    NonNegativeInt,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    Range,
    Seed,
    Temperature,
)
from vr_jax.hub import local_folder
from vr_jax.inference import Generator, load_for_inference, memory_errors, with_penalty, with_pruning
from vr_jax.model_directory import GENERATION_FILE, read_config
from vr_jax.path_text import PathText
from vr_jax.processes.liveness import HEARTBEAT_TIMEOUT, START_TIMEOUT
from vr_jax.sharding import make_mesh

DType = Literal["float32", "bfloat16"]
Weights = Literal["int8", "nf4"]
# Below the time after which another start takes over the folder of a run (`vr_jax.storage.STALE_AFTER`), so that a
# process which the others have given up has ended by then.
HeartbeatTimeout = Annotated[float, Range(0.5, 45)]
WEIGHTS_HELP = (
    "Keeps the kernels of linear layers in 8 or 4 bits, which needs less memory and changes answers a little. "
    "By default they are like the other parameters."
)
DTYPE_HELP = (
    "Type of parameters and activations. By default each parameter keeps its stored type, and config.json says that of "
    "the activations."
)
MAX_NEW_TOKENS = 512
CONFIG_HELP = (
    "Config file, or a packaged one, with its variant. --config.FIELD=VALUE sets a field, "
    "e.g. --config.optimizer.lr=1e-4."
)


logger = logging.getLogger("vr_jax.cli")


@dataclass(frozen=True, kw_only=True)
class ProcessFlags(Flags):
    """Flags by which the processes of a run on several hosts find each other."""

    distributed: bool = flag(False, "Run in several processes that JAX finds by itself (TPU pods, Slurm, Open MPI).")
    coordinator: str | None = flag(
        None,
        "Run in several processes; the address of process 0.",
        metavar="HOST:PORT",
        environment="JAX_COORDINATOR_ADDRESS",
    )
    num_processes: PositiveInt | None = flag(
        None, "Number of processes, with --coordinator.", environment="JAX_NUM_PROCESSES"
    )
    process_id: NonNegativeInt | None = flag(
        None, "Number of this process, from 0, with --coordinator.", environment="JAX_PROCESS_ID"
    )
    heartbeat_timeout: HeartbeatTimeout = flag(
        HEARTBEAT_TIMEOUT,
        "Seconds without a sign of life after which a process counts as lost.",
        metavar="SECONDS",
        environment="VR_JAX_HEARTBEAT_TIMEOUT",
    )
    start_timeout: PositiveFloat = flag(
        START_TIMEOUT,
        "Seconds that the processes wait for each other to start.",
        metavar="SECONDS",
        environment="VR_JAX_START_TIMEOUT",
    )


def read_image_size(text: str | None) -> tuple[int, int] | None:
    """Returns the (width, height) that --image_size gives, or None where it is not given.

    Raises:
        UserError: The text is not of the form WIDTHxHEIGHT.
    """
    if text is None:
        return None
    match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text)
    if match is None:
        raise UserError(f"--image_size={text}: expected WIDTHxHEIGHT in pixels, e.g. 1024x768")
    return int(match[1]), int(match[2])


def start_processes(flags: ProcessFlags) -> None:
    """Joins the processes of the run, before anything else asks JAX for devices."""
    distributed.initialize(
        flags.coordinator,
        flags.num_processes,
        flags.process_id,
        automatic=flags.distributed,
        heartbeat_timeout=flags.heartbeat_timeout,
        start_timeout=flags.start_timeout,
    )
    if not distributed.is_first():
        logs.quiet()


@dataclass(frozen=True, kw_only=True)
class AnswerFlags(Flags):
    """Flags that say how a checkpoint is loaded and how it answers."""

    no_effect: ClassVar[tuple[NoEffect, ...]] = (
        NoEffect(
            ("top_p", "seed"),
            "temperature",
            lambda flags: flags.temperature == 0,
            "greedy decoding draws nothing; set a temperature above 0",
        ),
    )

    checkpoint: PathText = flag(
        help="Model directory: what `train`, `convert` and `demo` write, or its name on the hub.", metavar="DIR"
    )
    max_new_tokens: PositiveInt | None = flag(
        None, f"Longest answer, in tokens. The default is that of generation_config.json, or {MAX_NEW_TOKENS}."
    )
    temperature: Temperature = flag(0.0, "Sampling temperature; 0 is greedy decoding.")
    top_p: PositiveFraction = flag(
        1.0, "Probability that the most probable tokens must reach together; the others are not drawn."
    )
    seed: Seed = flag(0, "Seed of the random draws at a temperature above 0.")
    repetition_penalty: PositiveFloat | None = flag(
        None, "Penalty for tokens that occurred; 1 is none. The default is that of generation_config.json."
    )
    dtype: DType | None = flag(None, DTYPE_HELP)
    weights: Weights | None = flag(None, WEIGHTS_HELP)
    pruning: str | None = flag(
        None, "Drops vision tokens: the name of a pruner, or a JSON object with its fields.", metavar="NAME|JSON"
    )
    tensor: PositiveInt = flag(1, "Number of devices that the model is cut over.")


@contextlib.contextmanager
def load_generator(flags: AnswerFlags, *, all_devices: bool = False) -> Iterator[tuple[Generator, Processor]]:
    """Loads a checkpoint for as long as the block runs.

    Args:
        flags: The checkpoint, and how it is loaded.
        all_devices: Whether all devices share the rows of a batch, `tensor` devices for each share of the rows. By
            default the model is on the first `tensor` devices.

    Raises:
        UserError: The checkpoint cannot be loaded, or the memory of the devices does not suffice.

    Yields:
        The generator and the processor.
    """
    use_compilation_cache()
    checkpoint = local_folder(flags.checkpoint)
    config = with_pruning(read_config(checkpoint), flags.pruning)
    devices = jax.devices() if all_devices else jax.devices()[: flags.tensor]
    mesh = make_mesh(1, -1, flags.tensor, devices=devices) if max(len(devices), flags.tensor) > 1 else None
    with memory_errors(), jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        loaded = load_for_inference(checkpoint, mesh, config=config, dtype=flags.dtype, weights=flags.weights)
        if loaded.generation.do_sample and not flags.temperature:
            logger.warning("%s says do_sample; answers are greedy unless --temperature is given", GENERATION_FILE)
        settings = with_penalty(loaded.generation, flags.repetition_penalty)
        yield Generator(loaded.model, loaded.tokenizer, settings=settings), loaded.processor
