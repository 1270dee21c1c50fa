"""The settings of LoRA adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from vr_jax.fields import Config, Distinct, NoEffect, PositiveFloat, Range, Text, check


@dataclass(frozen=True, kw_only=True)
class LoraSettings(Config):
    """LoRA adapters of linear layers (Hu et al. 2021, arXiv 2106.09685), as peft computes them, without dropout.

    A layer with the kernel W computes x W + scale (x A) B, where A (in, rank) and B (rank, out) are trained and W is
    frozen.

    Attributes:
        rank: Rank of the adapters; 0 trains none.
        alpha: The scale is alpha / rank.
        targets: Globs of parameter paths. The kernels of linear layers that they match get an adapter and are frozen,
            whatever `config.trainable` says. The output head and the embedding of patches never get one.
        rslora: Whether the scale is alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732).
    """

    no_effect: ClassVar = (
        NoEffect(
            ("alpha", "targets", "rslora"),
            "rank",
            lambda lora: lora.rank == 0,
            "there are no adapters; set a rank of 1 or more",
        ),
    )

    rank: Annotated[int, Range(0, 65536)] = 0
    alpha: PositiveFloat = 16.0
    targets: Annotated[tuple[Text, ...], Distinct()] = ("decoder.*",)
    rslora: bool = False

    def __post_init__(self) -> None:
        """Checks the fields, and that they go together."""
        super().__post_init__()
        check(
            bool(self.targets) or self.rank == 0,
            f"config.lora.targets is empty: config.lora.rank = {self.rank} has no layer; name some, or set the rank "
            "to 0",
        )

    @property
    def scale(self) -> float:
        """What the product of an adapter's matrices is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)
