"""What was measured, as data: what efficiency.json holds."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vr_jax.model.config import VlmConfig

VERSION = 1  # of efficiency.json


class EfficiencyError(ValueError):
    """A measurement that cannot be made as asked; one line for the user."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is the same for all systems. dtype: of parameters and activations. buckets: prompts are padded as `chat` and
    `eval.py` pad them, instead of not at all. Raises EfficiencyError for numbers that measure nothing."""

    image: str = "anyres4"
    text_tokens: int = 60
    new_tokens: int = 64
    batch_size: int = 1
    repeats: int = 7
    warmup: int = 2
    dtype: str | None = None  # None: float32 on CPUs, else bfloat16
    buckets: bool = False
    isolated: bool = False

    def __post_init__(self):
        for name, least in (("text_tokens", 1), ("new_tokens", 2), ("batch_size", 1), ("repeats", 1), ("warmup", 1)):
            if getattr(self, name) < least:
                raise EfficiencyError(f"{name} = {getattr(self, name)}: expected at least {least}")

    def on(self, platform: str) -> Settings:
        """With the dtype that suits a device, where none was asked for."""
        return dataclasses.replace(self, dtype=self.dtype or ("float32" if platform == "cpu" else "bfloat16"))

    def typed(self, config: VlmConfig) -> VlmConfig:
        """`config` with this dtype."""
        return dataclasses.replace(config, dtype=self.dtype)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Machine:
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
    """Bytes that the compiled programs need on the device, by XLA's buffer assignment: everything passed to them (all
    parameters), results and temporaries, less what is reused in place. None where the backend does not say."""

    parameters: int
    prefill: int | None
    decode: int | None

    @property
    def peak(self) -> int | None:
        return None if self.prefill is None or self.decode is None else max(self.prefill, self.decode)


@dataclass(frozen=True)
class Spread:
    """Repeats of one number."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def low(self) -> float:
        return min(self.values)

    @property
    def high(self) -> float:
        return max(self.values)

    def to_dict(self) -> dict[str, Any]:
        return {"median": self.median, "lowest": self.low, "highest": self.high, "repeats": list(self.values)}


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One system. `measured_peak_bytes` is the device's own statistic, where it keeps one and the system had the
    process for itself."""

    name: str
    source: str
    model: dict[str, Any]
    parameters: int
    tiles: int
    text_tokens: int
    vision_tokens: int  # cells and newlines, before anything is dropped
    vision_tokens_by_stage: tuple[int, ...]  # with a pruner, what every stage of the decoder sees; else one number
    prompt_slots_by_stage: tuple[int, ...]  # the same with text and padding
    first_token_seconds: tuple[float, ...]
    decode_seconds: tuple[float, ...]
    decoded_tokens: int  # of all rows, in decode_seconds
    memory: Memory
    measured_peak_bytes: int | None

    @property
    def first_token_ms(self) -> Spread:
        return Spread(tuple(1e3 * seconds for seconds in self.first_token_seconds))

    @property
    def tokens_per_second(self) -> Spread:
        return Spread(tuple(self.decoded_tokens / seconds for seconds in self.decode_seconds))


@dataclass(frozen=True)
class Report:
    machine: Machine
    settings: Settings
    measurements: tuple[Measurement, ...]

    def to_dict(self, scores: Sequence[float | None]) -> dict[str, Any]:
        """What efficiency.json holds; ratios are those of medians to the first system's."""
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
