"""What a plan says, as data that goes into JSON as it is."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one chip. The arguments by kind are exact; temporaries (gradients, activations, what is gathered) are
    what the compiler allocated. capacity: None where it is not known."""

    trained: int
    frozen: int
    optimizer: int
    cache: int  # keys and values, of inference
    inputs: int  # the batch, and small state
    temporaries: int | None  # None: the compiler gave up, so it does not fit
    results: int  # of results that do not take the place of an argument
    code: int
    capacity: float | None
    needed: float | None = None  # what the compiler said when it gave up

    @property
    def arguments(self) -> int:
        return self.trained + self.frozen + self.optimizer + self.cache + self.inputs

    @property
    def peak(self) -> float | None:
        if self.temporaries is None:
            return self.needed
        return self.arguments + self.temporaries + self.results + self.code

    @property
    def fits(self) -> bool | None:
        if self.temporaries is None:
            return False
        return None if self.capacity is None or self.peak is None else self.peak <= self.capacity


@dataclass(frozen=True, kw_only=True)
class Work:
    """Per run of the program (a step, a prefill, a decoded token): what one chip does.

    flops: counted in the compiled program. asked_flops: counted in the traced program, over the number of chips.
    model_flops: what the model needs by `vr_jax/training/flops.py` for full rows, over the number of chips."""

    flops: float
    asked_flops: float
    model_flops: float
    hbm_bytes: float
    collective_bytes: dict[str, float]
    collective_seconds: float | None


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """Seconds that one run takes at least on this chip, if everything else were free; the bound is the largest."""

    compute: float
    hbm: float
    interconnect: float
    mfu: float  # at the bound: model_flops / (bound * peak)

    @property
    def bound(self) -> float:
        return max(self.compute, self.hbm, self.interconnect)

    @property
    def limit(self) -> str:
        return max(("compute", "hbm", "interconnect"), key=lambda name: getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """An epoch. samples: of the paper's data for this phase. days: at `efficiency` times the bound's speed."""

    samples: int
    steps: int
    efficiency: float
    days: float | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    config: str
    mode: str  # train, prefill or decode
    topology: str
    chips: int
    mesh: dict[str, int]
    settings: dict[str, Any]  # rows, tokens, tiles, accumulation, remat, attention, ...
    notes: list[str]  # what was changed, or is worth changing
    parameters: int
    trained_parameters: int
    tokens: int  # per run
    samples: float  # per run; prompts at inference
    memory: Memory
    work: Work | None  # None where it did not compile
    roofline: Roofline | None
    schedule: Schedule | None
    compile_seconds: float
    versions: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        plain = dataclasses.asdict(self)
        plain["memory"] |= {name: getattr(self.memory, name) for name in ("arguments", "peak", "fits")}
        if self.roofline is not None:
            plain["roofline"] |= {"bound": self.roofline.bound, "limit": self.roofline.limit}
        return plain
