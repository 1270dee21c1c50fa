"""Measures the time of an update while a checkpoint is written in the background, against updates beside no save.

    python -m benchmarks.speed.saving [--width=512] [--layers=8] [--rounds=4]

The update and the checkpoints are those of `vr-jax train`, on this machine's default device, with the model of
configs/demo.py and a wider and deeper decoder. In each round as many updates are made without a save as beside one, so
that a busy machine slows both alike. With --tiny the decoder is that of the demo.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp

from vr_jax import sharding
from vr_jax.model_directory import warm_start
from vr_jax.settings import LOSS, load_config
from vr_jax.training import TrainState, abstract_batch, build_program, create_state
from vr_jax.training.checkpoint import Checkpoints, state_bytes

MOST = 200  # updates beside one save, at most


@dataclass
class Times:
    """Seconds.

    Attributes:
        alone: Each update beside no save.
        beside: Each update beside a save.
        blocked: For each save, the time in which the loop waits: for the copy of the state to the host.
        saves: For each save, the time until it is complete.
    """

    alone: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    blocked: list[float] = field(default_factory=list)
    saves: list[float] = field(default_factory=list)


def measure(overrides: list[str], rounds: int, workdir: Path) -> tuple[Times, int]:
    """Returns the times, and the bytes of the state.

    Args:
        overrides: Fields of configs/demo.py that are set.
        rounds: Number of saves.
        workdir: A folder for the checkpoints.
    """
    config = load_config("configs/demo.py", overrides)
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    program = build_program(config, mesh, 1000)
    times = Times()
    with jax.set_mesh(mesh), Checkpoints(workdir, keep_last=1, keep_best=0) as checkpoints:
        model, _ = warm_start([], config.model, mesh)
        state = create_state(program.tree, program.optimizer, program.abstract, model)
        batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), abstract_batch(config, mesh))

        def update(state: TrainState) -> tuple[TrainState, float]:
            began = time.perf_counter()
            state, metrics = program.step(state, batch)
            jax.block_until_ready(metrics)
            return state, time.perf_counter() - began

        for _ in range(3):
            state, _ = update(state)
        for number in range(1, rounds + 1):
            began = time.perf_counter()
            checkpoints.save(number, state, data=None, config={}, skip_statistics=None, metrics={LOSS: 1.0})
            times.blocked.append(time.perf_counter() - began)
            beside = []
            while len(beside) < MOST and checkpoints.is_saving():
                state, seconds = update(state)
                beside.append(seconds)
            checkpoints.wait()
            times.saves.append(time.perf_counter() - began)
            times.beside += beside
            for _ in beside:
                state, seconds = update(state)
                times.alone.append(seconds)
        return times, state_bytes(state)


def report(times: Times, size: int) -> str:
    """The medians and their ratio as text."""
    alone, beside = (statistics.median(part) if part else float("nan") for part in (times.alone, times.beside))
    return "\n".join(
        [
            f"a state of {size / 2**20:,.0f} MiB, {len(times.saves)} saves",
            f"  the loop waits for the copy to the host  {statistics.median(times.blocked) * 1e3:,.1f} ms",
            f"  until the save is complete               {statistics.median(times.saves) * 1e3:,.1f} ms",
            f"  an update beside no save                 {alone * 1e3:,.1f} ms (median of {len(times.alone)})",
            f"  an update beside a save                  {beside * 1e3:,.1f} ms (median of {len(times.beside)}), "
            f"x {beside / alone:.2f}",
        ]
    )


def parser() -> argparse.ArgumentParser:
    """The flags of this script."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--width", type=int, default=512, help="channels of the decoder (%(default)s)")
    flags.add_argument("--layers", type=int, default=8, help="layers of the decoder (%(default)s)")
    flags.add_argument("--rounds", type=int, default=4, help="number of saves (%(default)s)")
    flags.add_argument("--tiny", action="store_true", help="the decoder of configs/demo.py")
    return flags


def main(arguments: list[str] | None = None) -> None:
    """Measures and prints."""
    options = parser().parse_args(arguments)
    overrides = ["batch.rows=1", "batch.accumulation=1", "batch.tokens=128", "steps=1000"]
    if not options.tiny:
        decoder = {"hidden_size": options.width, "intermediate_size": 4 * options.width, "num_layers": options.layers}
        overrides += [f"model.decoder.{name}={value}" for name, value in decoder.items()]
    with tempfile.TemporaryDirectory() as folder:
        print(report(*measure(overrides, options.rounds, Path(folder))))


if __name__ == "__main__":
    main()
