"""The settings and the results of a measurement, as data: what efficiency.json contains."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from vr_jax.fields import MAX_INT, Config, PositiveInt, Range
from vr_jax.model.config import VlmConfig

# The format version of efficiency.json.
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class EfficiencySettings(Config):
    """The settings that all systems share.

    Attributes:
        image: The layout of the image: "anyres4", "anyres9", or "config" for the layout of each config.
        image_size: The (width, height) of the image, or None for the largest that the layout has.
        text_tokens: The tokens of the prompt that are not the image's, those of the chat template included.
        new_tokens: The tokens that are generated.
        batch_size: The number of equal prompts that are answered together.
        repeats: The measured runs of each system.
        warmup: The runs before the measured ones.
        dtype: The type of parameters and activations. None is float32 on CPUs and bfloat16 elsewhere.
        buckets: Whether prompts are padded as `vr-jax chat` and `vr-jax eval` pad them. Otherwise they are not padded.
        isolated: Whether each system is measured in a process of its own.
    """

    image: str = "anyres4"
    image_size: tuple[PositiveInt, PositiveInt] | None = None
    text_tokens: PositiveInt = 60
    new_tokens: Annotated[int, Range(2, MAX_INT)] = 64
    batch_size: PositiveInt = 1
    repeats: PositiveInt = 7
    warmup: PositiveInt = 2
    dtype: Literal["float32", "bfloat16"] | None = None
    buckets: bool = False
    isolated: bool = False

    def for_platform(self, platform: str) -> EfficiencySettings:
        """Returns the settings with the default dtype of a platform, unless one is chosen."""
        return dataclasses.replace(self, dtype=self.dtype or ("float32" if platform == "cpu" else "bfloat16"))

    def typed(self, config: VlmConfig) -> VlmConfig:
        """Returns the config of a model with the dtype of these settings."""
        return dataclasses.replace(config, dtype=self.dtype)  # type: ignore[arg-type]  # `for_platform` has set it.


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine of a measurement.

    Attributes:
        device: The kind of the device, as JAX names it.
        platform: The platform of the device, such as "cpu" or "gpu".
        devices_used: The number of devices that the models run on.
        processor: The model of the CPU.
        cores: The number of CPU cores.
        python: The version of Python.
        jax: The version of jax.
        jaxlib: The version of jaxlib.
        flax: The version of flax.
    """

    device: str
    platform: str
    devices_used: int
    processor: str
    cores: int
    python: str
    jax: str
    jaxlib: str
    flax: str


@dataclass(frozen=True)
class Memory:
    """The bytes that the compiled programs need on the device, according to XLA's buffer assignment.

    They are all arguments (all parameters among them), results and temporaries, less what is reused in place.

    Attributes:
        parameters: The bytes of the parameters.
        prefill: The bytes of the prefill program, or None where the backend does not tell.
        decode: The bytes of the decoding program, or None where the backend does not tell.
    """

    parameters: int
    prefill: int | None
    decode: int | None

    @property
    def peak(self) -> int | None:
        """The larger of the two programs, or None where the backend does not tell."""
        return None if self.prefill is None or self.decode is None else max(self.prefill, self.decode)


@dataclass(frozen=True)
class Repeats:
    """The values of a number in all measured runs.

    Attributes:
        values: The values in the order of the runs.
    """

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median of the values."""
        return statistics.median(self.values)

    @property
    def low(self) -> float:
        """The lowest value."""
        return min(self.values)

    @property
    def high(self) -> float:
        """The highest value."""
        return max(self.values)

    def to_dict(self) -> dict[str, Any]:
        """Returns the values and their summary for efficiency.json."""
        return {"median": self.median, "lowest": self.low, "highest": self.high, "repeats": list(self.values)}


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The measurement of one system.

    Attributes:
        name: The name in tables.
        source: The config file or model directory.
        model: The config of the model as a dictionary.
        parameters: The number of parameters.
        tiles: The number of image tiles of the prompt.
        text_tokens: The tokens of the prompt that are not the image's.
        vision_tokens: The tokens of the image, newlines included, before any is pruned.
        vision_tokens_by_stage: With a pruner, the vision tokens in each stage of the decoder; otherwise one number.
        prompt_slots_by_stage: The same with text and padding.
        first_token_seconds: The time to the first token of each run.
        decode_seconds: The time of decoding the other tokens in each run.
        decoded_tokens: The number of tokens of all rows that are decoded in `decode_seconds`.
        memory: The memory that the compiled programs need.
        measured_peak_bytes: The peak that the device itself recorded, where it records one and the system had the
            process for itself.
    """

    name: str
    source: str
    model: dict[str, Any]
    parameters: int
    tiles: int
    text_tokens: int
    vision_tokens: int
    vision_tokens_by_stage: tuple[int, ...]
    prompt_slots_by_stage: tuple[int, ...]
    first_token_seconds: tuple[float, ...]
    decode_seconds: tuple[float, ...]
    decoded_tokens: int
    memory: Memory
    measured_peak_bytes: int | None

    @property
    def first_token_ms(self) -> Repeats:
        """The time to the first token in milliseconds."""
        return Repeats(tuple(1e3 * seconds for seconds in self.first_token_seconds))

    @property
    def tokens_per_second(self) -> Repeats:
        """The decoding speed in tokens per second, over all rows."""
        return Repeats(tuple(self.decoded_tokens / seconds for seconds in self.decode_seconds))


@dataclass(frozen=True)
class Report:
    """The measurements of all systems.

    Attributes:
        machine: The machine.
        settings: The settings that all systems share.
        measurements: One measurement for each system; ratios refer to the first.
    """

    machine: Machine
    settings: EfficiencySettings
    measurements: tuple[Measurement, ...]

    def to_dict(self, scores: Sequence[float | None]) -> dict[str, Any]:
        """Returns the contents of efficiency.json. Ratios compare medians with those of the first system.

        Args:
            scores: The accuracy of each system, or None where it is not known.
        """
        first = self.measurements[0]
        return {
            "version": VERSION,
            "machine": dataclasses.asdict(self.machine),
            "settings": dataclasses.asdict(self.settings),
            "systems": [
                {
                    "name": one.name,
                    "source": one.source,
                    "parameters": one.parameters,
                    "tiles": one.tiles,
                    "text_tokens": one.text_tokens,
                    "vision_tokens": one.vision_tokens,
                    "vision_tokens_by_stage": list(one.vision_tokens_by_stage),
                    "prompt_slots_by_stage": list(one.prompt_slots_by_stage),
                    "time_to_first_token_ms": one.first_token_ms.to_dict()
                    | {"ratio": one.first_token_ms.median / first.first_token_ms.median},
                    "tokens_per_second": one.tokens_per_second.to_dict()
                    | {"ratio": one.tokens_per_second.median / first.tokens_per_second.median},
                    "memory_bytes": {
                        "parameters": one.memory.parameters,
                        "compiled_prefill": one.memory.prefill,
                        "compiled_decode": one.memory.decode,
                        "compiled_peak": one.memory.peak,
                        "measured_peak": one.measured_peak_bytes,
                    },
                    "score": score,
                    "model": one.model,
                }
                for one, score in zip(self.measurements, scores, strict=True)
            ],
        }
