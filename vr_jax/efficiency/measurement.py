"""The measurement on one device: the programs of the generator, after warm-up, with all systems in turns."""

from __future__ import annotations

import gc
import os
import platform
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vr_jax.compilation import use_compilation_cache
from vr_jax.data.demo.tokenizer import demo_tokenizer
from vr_jax.data.processor import Processor
from vr_jax.data.types import Example
from vr_jax.efficiency.results import EfficiencySettings, Machine, Measurement, Memory, Report
from vr_jax.efficiency.systems import System, is_vision, prompt
from vr_jax.errors import UserError
from vr_jax.hub import local_folder
from vr_jax.inference import Buckets, Generator, Loaded, Program, load_for_inference
from vr_jax.model.config import VlmConfig
from vr_jax.model.vlm import VisionLanguageModel, abstract_model
from vr_jax.sharding import path_of

Progress = Callable[[str], None]


def measure(systems: Sequence[System], settings: EfficiencySettings, progress: Progress = lambda line: None) -> Report:
    """Measures all systems in turns, so that a busy machine slows all of them alike.

    Args:
        systems: The systems, whose models are in memory together.
        settings: The settings that all systems share.
        progress: Receives a line at each stage.

    Raises:
        UserError: The models do not fit in memory, or one of them cannot be read.
    """
    settings = settings.for_platform(jax.devices()[0].platform)
    _check_memory(systems, settings)
    try:
        subjects = []
        for system in systems:
            progress(f"{system.name}: compiling")
            subjects.append(_Subject(system, settings))
        gc.disable()  # A collection must not fall into a measured time.
        for turn in range(settings.warmup + settings.repeats):
            if turn in (0, settings.warmup):
                progress("measuring" if turn else "warming up")
            gc.collect()
            for subject in subjects:
                subject.run(keep=turn >= settings.warmup)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(_too_large(len(systems), str(error).splitlines()[0])) from error
    finally:
        gc.enable()
    # The device records one peak for the whole process and cannot reset it.
    measured = _measured_peak() if len(systems) == 1 else None
    return Report(_machine(), settings, tuple(subject.result(measured) for subject in subjects))


def measure_isolated(
    systems: Sequence[System], settings: EfficiencySettings, progress: Progress = lambda line: None
) -> Report:
    """Measures one system after another, each in a process of its own.

    This needs less memory, and the device records a peak for each system. However, a machine that is busy for a while
    may slow one system and not the other.

    Args:
        systems: The systems.
        settings: The settings that all systems share.
        progress: Receives a line for each system.

    Raises:
        UserError: A model does not fit in memory or cannot be read, or its process was killed.
    """
    reports = []
    for system in systems:
        progress(f"{system.name}: in a process of its own")
        with ProcessPoolExecutor(1, get_context("spawn"), use_compilation_cache) as pool:
            try:
                reports.append(pool.submit(measure, [system], settings).result())
            except BrokenProcessPool as error:
                raise UserError(
                    f"{system.name}: its process was killed, most likely for lack of memory; try a smaller "
                    "--batch_size or --dtype=bfloat16."
                ) from error
    return Report(
        reports[0].machine, reports[0].settings, tuple(one for report in reports for one in report.measurements)
    )


class _Subject:
    """A system with its parameters on the device and its programs compiled."""

    def __init__(self, system: System, settings: EfficiencySettings):
        self.system, self.settings = system, settings
        loaded = load(system, settings)
        self.example = prompt(loaded.processor, settings.text_tokens, settings.image_size)
        buckets = Buckets.of(system.config) if settings.buckets else _exact(self.example)
        self.generator = Generator(loaded.model, loaded.tokenizer, buckets, ignore_stop=True)
        self.prompts = self.generator.batch(
            dict.fromkeys(range(settings.batch_size), self.example), settings.batch_size
        )
        programs = self.generator.programs(self.prompts, settings.new_tokens)
        self.memory = _memory(loaded.model, programs)
        self.first: list[float] = []
        self.rest: list[float] = []

    def run(self, keep: bool) -> None:
        """Times one run: from the prompt in host memory to the first token in host memory, and on to the last token."""
        new_tokens = self.settings.new_tokens
        start = time.perf_counter()
        state = self.generator.prefill(self.prompts, new_tokens)
        np.asarray(state.tokens)
        first = time.perf_counter()
        state = self.generator.decode(state, new_tokens)
        np.asarray(state.tokens)
        end = time.perf_counter()
        if int(state.step) != new_tokens:
            raise UserError(f"{self.system.name}: {state.step} tokens were decoded, but {new_tokens} were expected.")
        if keep:
            self.first.append(first - start)
            self.rest.append(end - first)

    def result(self, measured_peak: int | None) -> Measurement:
        """Returns the measurement of all runs."""
        config, text = self.system.config, int(np.sum(~is_vision(self.example)))
        slots = self.prompts.batch.tokens.shape[1]
        stages = self.prompts.lengths or (slots,)
        kept = self.generator.kept(self.example) or [len(self.example.tokens)]
        return Measurement(
            name=self.system.name,
            source=self.system.source.text,
            model=config.to_dict(),
            parameters=sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(self.generator.model)),
            tiles=len(self.example.tile_pixels),
            text_tokens=text,
            vision_tokens=len(self.example.tokens) - text,
            vision_tokens_by_stage=tuple(length - text for length in kept),
            prompt_slots_by_stage=tuple(stages),
            first_token_seconds=tuple(self.first),
            decode_seconds=tuple(self.rest),
            decoded_tokens=(self.settings.new_tokens - 1) * self.settings.batch_size,
            memory=self.memory,
            measured_peak_bytes=measured_peak,
        )


def _exact(example: Example) -> Buckets:
    """Returns buckets of every length, so that neither a prompt nor what a pruner leaves of it is padded."""
    return Buckets(tokens=tuple(range(1, len(example.tokens) + 1)), tiles=(len(example.tile_pixels),))


def load(system: System, settings: EfficiencySettings) -> Loaded:
    """Loads the model of a system onto the default device, with its own or with random weights.

    Raises:
        UserError: The model directory cannot be read.
    """
    config = settings.typed(system.config)
    if system.source.kind == "checkpoint":
        return load_for_inference(local_folder(system.source.text), config=config, dtype=config.dtype)
    # Only the template of the tokenizer matters here, and every vocabulary is large enough for the demo's tokenizer.
    return Loaded(random_model(config), Processor(demo_tokenizer(), config))


def random_model(config: VlmConfig, seed: int = 0) -> VisionLanguageModel:
    """Makes a model with random parameters in the dtype of the activations.

    The parameters are drawn on the host, one array at a time. So the device never holds more than the parameters, and
    the peak that it records is that of running the model.

    Args:
        config: The config of the model.
        seed: The seed of the parameters.
    """
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if path_of(path).endswith("scale"):
            values = np.ones(leaf.shape, np.float32)
        else:
            values = rng.standard_normal(leaf.shape, np.float32)
            values *= 0.02
        return jax.device_put(values.astype(config.dtype))

    return jax.tree_util.tree_map_with_path(draw, abstract_model(config))


def _memory(model: VisionLanguageModel, programs: dict[str, Program]) -> Memory:
    """Adds up the buffers of the compiled programs."""
    needs = {}
    for name, program in programs.items():
        stats = program.compiled.memory_analysis()
        if stats is None:
            return Memory(_bytes(model), None, None)
        arguments = max(program.argument_bytes, stats.argument_size_in_bytes)
        needs[name] = arguments + stats.output_size_in_bytes + stats.temp_size_in_bytes - stats.alias_size_in_bytes
    return Memory(_bytes(model), needs["prefill"], needs["decode"])


def _bytes(model: VisionLanguageModel) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(model))


def _check_memory(systems: Sequence[System], settings: EfficiencySettings) -> None:
    """Checks that the parameters fit in memory, because the system kills a CPU process that needs more."""
    room = _free_bytes()
    needed = 0
    for system in systems:
        config = settings.typed(system.config)
        leaves = jax.tree.leaves(abstract_model(config))
        needed += sum(int(np.prod(leaf.shape)) for leaf in leaves) * np.dtype(config.dtype).itemsize
    if room is not None and needed > room:
        detail = f"the parameters need {needed / 2**30:.1f} GiB, and {room / 2**30:.1f} GiB are free"
        raise UserError(_too_large(len(systems), detail))


def _free_bytes() -> int | None:
    """Returns the free bytes of the device, or of the host if the device is a CPU; None if they are not known."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    information = Path("/proc/meminfo")
    if jax.devices()[0].platform != "cpu" or not information.is_file():
        return None
    fields = dict(line.split(":") for line in information.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def _too_large(count: int, detail: str) -> str:
    """Returns the message for models that do not fit in memory."""
    together = (
        f"{count} systems side by side do not fit in memory" if count > 1 else "The system does not fit in memory"
    )
    isolate = "--isolate (one after another), " if count > 1 else ""
    return f"{together} ({detail}); try {isolate}--dtype=bfloat16 or a smaller --batch_size."


def _measured_peak() -> int | None:
    stats = jax.devices()[0].memory_stats()
    return stats.get("peak_bytes_in_use") if stats else None


def _machine() -> Machine:
    device = jax.devices()[0]
    return Machine(
        device=device.device_kind,
        platform=device.platform,
        devices_used=1,
        processor=_processor(),
        cores=os.cpu_count() or 0,
        python=platform.python_version(),
        jax=jax.__version__,
        jaxlib=version("jaxlib"),
        flax=version("flax"),
    )


def _processor() -> str:
    """Returns the model name of the CPU."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
