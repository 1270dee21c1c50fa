"""`vr-jax experiments`: lists the rows of the paper's tables."""

from __future__ import annotations

from dataclasses import dataclass

from vr_jax import experiments
from vr_jax.cli.flags import Command, Flags


@dataclass(frozen=True, kw_only=True)
class ExperimentsFlags(Flags):
    """`vr-jax experiments` has no flags."""


def run(flags: ExperimentsFlags) -> None:
    """Prints every row with the methods that it switches on."""
    print(experiments.listing())


COMMAND = Command(
    summary="List the rows of the paper's tables, each with its config.",
    flags=ExperimentsFlags,
    run=run,
    details="A row is trained by its name: TABLE/ROW, then optionally the size (0.5b, 1.5b, 7b) and the phase.",
    examples=("vr-jax train --config=configs/tables/paper.py:table3/deepstack/1.5b/phase1 --workdir=runs/deepstack",),
)
