"""The settings of the batch, the optimizer, the mesh, the checkpoints and the profiler."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from vr_jax.fields import (
    Config,
    NoEffect,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    Range,
    Text,
    check,
)

AxisSize = Annotated[int, Range(-1, 2**20)]
# The decay of a moment is below 1 in float32 too, where 1 - b ** t divides.
Decay = Annotated[float, Range(0, 0.999999)]
BelowOne = Annotated[float, Range(0, 1, open_high=True)]


@dataclass(frozen=True, kw_only=True)
class BatchSettings(Config):
    """The static shapes of the global batch of one update.

    Attributes:
        rows: Rows of the batch, over all devices and micro-batches.
        tokens: Token slots of a row.
        tiles: Image tile slots of a row.
        accumulation: Micro-batches of an update. Their gradients are summed.
        raise_rows: What is done where the mesh or `accumulation` does not divide `rows`. "refuse" is an error. The
            others raise the rows to the next multiple and `samples_per_step` with them, and name the rule for the
            learning rates: they are kept, multiplied by the factor of the samples, or by its square root.
    """

    rows: PositiveInt = 8
    tokens: Annotated[int, Range(1, 2**20)] = 2048  # Longer rows fit into no memory.
    tiles: PositiveInt = 10
    accumulation: PositiveInt = 1
    raise_rows: Literal["refuse", "keep_lr", "linear_lr", "sqrt_lr"] = "refuse"

    def __post_init__(self) -> None:
        """Checks the fields, and that they go together."""
        super().__post_init__()
        check(
            self.rows % self.accumulation == 0 or self.raise_rows != "refuse",
            f"config.batch.rows = {self.rows} is not divisible by config.batch.accumulation = {self.accumulation}",
        )


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(Config):
    """The optimizer and its learning rate; the defaults are those of LLaVA-NeXT's scripts (Hugging Face's Trainer).

    Attributes:
        name: "adamw"; "muon", with which Muon updates the matrices of linear layers and AdamW everything else; or
            "adafactor", which keeps no first moments, and of second moments a number for each row and each column of
            a matrix. Updates have about the same size with all three, so learning rates mean the same. Muon's are
            scaled to the size of Adam's (Liu et al. 2025, arXiv 2502.16982), and its own momentum is 0.95; `b1` and
            `b2` are those of AdamW. Adafactor (Shazeer and Stern 2018, arXiv 1804.04235) takes its learning rate from
            `lr` and `schedule`: transformers calls this `relative_step=False, scale_parameter=False`.
        lr: Learning rate at the end of the warm-up.
        schedule: "cosine" decays the learning rate to 0 at the last step, "constant" keeps it.
        warmup_ratio: Share of all steps, rounded up, in which the learning rate rises linearly from 0.
        b1: Decay of the first moment.
        b2: Decay of the second moment.
        eps: Added to the root of the second moment.
        first_moment_dtype: Type in which first moments are kept, Muon's momentum among them. "bfloat16" halves their
            memory; they are computed with in float32.
        decay_rate: Exponent of Adafactor's second moments: their decay at update t is 1 - t ** -decay_rate.
        clipping_threshold: Largest root mean square of Adafactor's update of one matrix or vector, before the learning
            rate; a larger one is scaled down.
        weight_decay: Decoupled weight decay. Biases and norm scales are never decayed.
        clip_norm: Largest norm of the gradient of all trained parameters together; a longer one is scaled down.
        lr_groups: Pairs of a glob of parameter paths and the learning rate of what it matches, e.g.
            (("encoder.*", 2e-6),). The first match counts; all other parameters have `lr`.
        weight_decay_groups: Pairs of a glob of parameter paths and the weight decay of what it matches. The first match
            counts; all other parameters have `weight_decay`.
    """

    no_effect: ClassVar = (
        NoEffect(
            ("b1", "b2", "eps", "first_moment_dtype"),
            "name",
            lambda own: own.name == "adafactor",
            "it has no first moments, and decay_rate sets the decay of its second moments",
        ),
        NoEffect(
            ("decay_rate", "clipping_threshold"),
            "name",
            lambda own: own.name != "adafactor",
            "only 'adafactor' has it; the others have b1, b2 and eps",
        ),
    )

    name: Literal["adamw", "muon", "adafactor"] = "adamw"
    lr: PositiveFloat = 1e-3
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_ratio: BelowOne = 0.03
    b1: Decay = 0.9
    b2: Decay = 0.999
    eps: PositiveFloat = 1e-8
    first_moment_dtype: Literal["float32", "bfloat16"] = "float32"
    decay_rate: PositiveFraction = 0.8
    clipping_threshold: PositiveFloat = 1.0
    weight_decay: NonNegativeFloat = 0.0
    clip_norm: PositiveFloat = 1.0
    lr_groups: tuple[tuple[Text, NonNegativeFloat], ...] = ()
    weight_decay_groups: tuple[tuple[Text, NonNegativeFloat], ...] = ()

    def __post_init__(self) -> None:
        """Checks the fields, and that they go together."""
        super().__post_init__()
        for name, groups in (("lr_groups", self.lr_groups), ("weight_decay_groups", self.weight_decay_groups)):
            globs = [glob for glob, _ in groups]
            for i, glob in enumerate(globs):
                check(glob not in globs[:i], f"config.optimizer.{name} has {glob!r} twice; drop one, the first counts")

    def warmup_steps(self, total: int) -> int:
        """Returns how many of the updates of a run belong to the warm-up. The only update of a run does not.

        Raises:
            ConfigError: All updates of a run of several would.
        """
        steps = math.ceil(total * self.warmup_ratio) if total > 1 else 0
        check(
            steps < total,
            f"config.optimizer.warmup_ratio = {self.warmup_ratio} makes all {total} updates a warm-up, which never "
            "reaches config.optimizer.lr; lower it, or train for more steps",
        )
        return steps


@dataclass(frozen=True, kw_only=True)
class MeshSettings(Config):
    """Sizes of the device mesh's axes.

    One of them may be -1: it takes the remaining devices. Where both `replica` and `fsdp` are, `fsdp` is the largest
    number of devices that divides the widths of all parameters, and `replica` takes the rest.

    Attributes:
        replica: Copies of the parameters; each computes its own part of the batch. On several slices it crosses the
            slower network between them.
        fsdp: Devices that share the parameters of a copy and its part of the batch.
        tensor: Devices that share each layer's computation.
        slices: Groups of devices between which the network is slower; 0 takes those of TPUs. Other devices are divided
            in their order into as many equal groups.
    """

    replica: AxisSize = -1
    fsdp: AxisSize = -1
    tensor: AxisSize = 1
    slices: Annotated[int, Range(0, 2**20)] = 0

    def __post_init__(self) -> None:
        """Checks the fields, and that they go together."""
        super().__post_init__()
        sizes = {"replica": self.replica, "fsdp": self.fsdp, "tensor": self.tensor}
        for axis, size in sizes.items():
            check(size != 0, f"config.mesh.{axis} = 0: expected a positive number, or -1 for the remaining devices")
        check(
            list(sizes.values()).count(-1) <= 1 or (self.replica == self.fsdp == -1 and self.tensor != -1),
            f"config.mesh = {sizes}: at most one axis may be -1, which takes the remaining devices, or replica and "
            "fsdp, which are then chosen",
        )


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings(Config):
    """When checkpoints are written and which are kept (docs/checkpoints.md).

    Attributes:
        every: Steps from one checkpoint to the next. The last step is always saved.
        keep_last: How many of the newest checkpoints are kept. A run continues from the newest, so there is one.
        keep_best: How many of the best ones are kept besides.
        best: The number that tells which are best: "loss", the mean training loss since the checkpoint before, or a
            number of the validation, e.g. "validation/held_out/loss". Of losses the lowest are best, of scores the
            highest.
    """

    no_effect: ClassVar = (
        NoEffect(
            ("best",), "keep_best", lambda own: own.keep_best == 0, "no checkpoint is kept for it; set 1 or more there"
        ),
    )

    every: PositiveInt = 500
    keep_last: PositiveInt = 3
    keep_best: NonNegativeInt = 1
    best: Text = "loss"


@dataclass(frozen=True, kw_only=True)
class ProfileSettings(Config):
    """Which steps are traced by the profiler into `<workdir>/profile`.

    Attributes:
        first_step: First traced step, counted from 1. With 0, it is the first one of each start of the run.
        steps: Number of traced steps. With 0, nothing is traced.
    """

    no_effect: ClassVar = (
        NoEffect(("first_step",), "steps", lambda own: own.steps == 0, "nothing is traced; set the number of steps"),
    )

    first_step: NonNegativeInt = 0
    steps: NonNegativeInt = 0
