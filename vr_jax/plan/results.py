"""The parts of a plan, as data that JSON can hold."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one chip. The arguments are exact, the other numbers are the compiler's.

    Attributes:
        trained: Trained parameters.
        frozen: Frozen parameters, or all parameters of inference.
        optimizer: The state of the optimizer: first moments, second moments and counters.
        first_moments: The part of `optimizer` that first moments are.
        second_moments: The part of `optimizer` that second moments are.
        cache: Keys and values of inference.
        inputs: The batch and small state.
        temporaries: Gradients, activations and gathered parameters; None if the compiler gave up.
        gradients: The gradients of the trained parameters, whose types and shardings they have. They all exist at the
            end of the backward pass, where most activations are gone.
        results: Results that do not take the place of an argument.
        code: The generated code.
        capacity: The memory of a chip, or None if it is not known.
        needed: The memory that the compiler stated when it gave up.
    """

    trained: int
    frozen: int
    optimizer: int
    cache: int
    inputs: int
    temporaries: int | None
    results: int
    code: int
    capacity: float | None
    needed: float | None = None
    first_moments: int = 0
    second_moments: int = 0
    gradients: int = 0

    @property
    def arguments(self) -> int:
        """The bytes of all arguments."""
        return self.trained + self.frozen + self.optimizer + self.cache + self.inputs

    @property
    def peak(self) -> float | None:
        """The bytes that the program needs, or None if they are not known."""
        if self.temporaries is None:
            return self.needed
        return self.arguments + self.temporaries + self.results + self.code

    @property
    def fits(self) -> bool | None:
        """Whether the program fits into a chip's memory, or None if that is not known."""
        if self.temporaries is None:
            return False
        return None if self.capacity is None or self.peak is None else self.peak <= self.capacity


@dataclass(frozen=True, kw_only=True)
class Work:
    """The work of one chip in one run of the program, which is an update, a prefill or a decoded token.

    Attributes:
        flops: The operations in the compiled program.
        asked_flops: The operations in the traced program, divided by the number of chips.
        model_flops: The operations that the model needs by the formulas of `vr_jax.training`, divided by the number of
            chips.
        hbm_bytes: Bytes read and written in device memory.
        collective_bytes: The bytes that the chip sends within its slice, by kind of collective.
        collective_seconds: The time of these messages at full bandwidth, or None if the bandwidth is not known.
        network_bytes: The bytes that the chip sends to other slices, by kind of collective.
        network_seconds: Their time at the full bandwidth of the network between slices, or None if it is not known.
    """

    flops: float
    asked_flops: float
    model_flops: float
    hbm_bytes: float
    collective_bytes: dict[str, float]
    collective_seconds: float | None
    network_bytes: dict[str, float] = field(default_factory=dict)
    network_seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """Lower bounds on the seconds of one run, each as if everything else took no time.

    Attributes:
        compute: The bound by the chip's peak FLOP/s.
        hbm: The bound by the bandwidth of its memory.
        interconnect: The bound by the bandwidth between chips of a slice.
        network: The bound by the bandwidth between slices; 0 on one slice.
        mfu: The model FLOP/s utilization at the largest bound, model_flops / (bound * peak).
    """

    compute: float
    hbm: float
    interconnect: float
    mfu: float
    network: float = 0.0

    @property
    def bound(self) -> float:
        """The largest of the bounds."""
        return max(self.compute, self.hbm, self.interconnect, self.network)

    @property
    def limit(self) -> str:
        """The name of the largest bound."""
        return max(("compute", "hbm", "interconnect", "network"), key=lambda name: getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """An epoch.

    Attributes:
        samples: The samples of the epoch.
        steps: The updates of the run.
        efficiency: The share of the bound's speed that the run reaches.
        days: The time at that speed, or None if there is no bound.
    """

    samples: int
    steps: int
    efficiency: float
    days: float | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The costs of a program on one chip of a topology.

    Attributes:
        config: The name of the config.
        mode: The program: train, prefill or decode.
        topology: The name of the topology.
        chips: The number of devices.
        mesh: The sizes of the mesh axes.
        settings: The settings that matter for the costs, such as rows, remat and attention.
        notes: Sentences about settings that were changed or are worth changing.
        parameters: The number of parameters.
        trained_parameters: The number of trained parameters.
        tokens: The tokens of one run.
        samples: The samples of one run, or the prompts of inference.
        memory: The memory of a chip.
        work: The work of a chip, or None if the program did not compile.
        roofline: The bounds on the time, or None if they are not known.
        schedule: An epoch of training, or None for inference.
        compile_seconds: The time of the compilation.
        versions: The versions of the libraries.
    """

    config: str
    mode: str
    topology: str
    chips: int
    mesh: dict[str, int]
    settings: dict[str, Any]
    notes: list[str]
    parameters: int
    trained_parameters: int
    tokens: int
    samples: float
    memory: Memory
    work: Work | None
    roofline: Roofline | None
    schedule: Schedule | None
    compile_seconds: float
    versions: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as plan.json holds it, with the computed properties of its parts."""
        plain = dataclasses.asdict(self)
        plain["memory"] |= {name: getattr(self.memory, name) for name in ("arguments", "peak", "fits")}
        if self.roofline is not None:
            plain["roofline"] |= {"bound": self.roofline.bound, "limit": self.roofline.limit}
        return plain
