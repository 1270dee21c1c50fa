"""Tries meshes, remat policies and micro-batches; compiles the promising ones."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vr_jax import sharding
from vr_jax.errors import UserError
from vr_jax.model.config import VlmConfig
from vr_jax.plan import report
from vr_jax.plan.compiling import bytes_per_chip
from vr_jax.plan.results import Plan
from vr_jax.plan.topology import Topology
from vr_jax.plan.training import STEPS, fit_rows, model_flops, plan_mesh, plan_training
from vr_jax.settings import TrainConfig
from vr_jax.training import TrainProgram, build_program

ACCUMULATIONS = (1, 2, 4)
# Two rough numbers per remat policy, which only decide what is compiled first: the share of the decoder's forward pass
# that the backward pass repeats, and the activations that are kept per token and layer, in widths of the hidden state.
_REPEATED = {"none": 0.0, "dots": 0.1, "full": 1.0}
_KEPT = {"none": 34.0, "dots": 12.0, "full": 1.0}


@dataclass(frozen=True)
class Candidate:
    """Settings that may be worth compiling.

    Attributes:
        settings: The fields that differ from the config file, with their values.
        config: The settings of the run.
        seconds: The estimated bound of an update, per sample.
    """

    settings: dict[str, Any]
    config: TrainConfig
    seconds: float


@dataclass
class SearchResult:
    """The result of a search.

    Attributes:
        plans: The compiled plans. Those that fit come first, in the order of their bound on the time per sample.
        flags: The flags of `vr-jax train` for each plan.
        left: Sentences about the candidates that were not compiled.
    """

    plans: list[Plan]
    flags: list[str]
    left: list[str] = field(default_factory=list)

    def _rows(self) -> list[list[str]]:
        rows = report.table(self.plans)
        return [[*rows[0], "vr-jax train"], *[[*row, flags] for row, flags in zip(rows[1:], self.flags, strict=True)]]

    def text(self) -> str:
        """Returns a table of all plans, and the best plan in full, for a terminal."""
        rows = self._rows()
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, "", report.text(self.plans[0]), f"\nvr-jax train {self.flags[0]}", *self.left])

    def markdown(self) -> str:
        """Returns the same as `text` as a page of Markdown."""
        rows = self._rows()
        rows[1:] = [[*row[:-1], f"`{row[-1]}`"] for row in rows[1:]]
        return "\n".join(
            [f"# Search on {self.plans[0].topology}", "", report.markdown_table(rows), "", *self.left, "", ""]
        ) + report.markdown(self.plans[0])


def search(
    name: str,
    config: TrainConfig,
    topology: Topology,
    *,
    budget: float,
    efficiency: float,
    samples: int | None,
    fixed_rows: bool,
    effort: str | None,
    say: Callable[[str], None],
) -> SearchResult:
    """Compiles candidates until the time is used up, the config's own settings first.

    Args:
        name: The config's name in messages and plans.
        config: The settings of the run.
        topology: The devices to plan for.
        budget: Seconds to use. At least one candidate is compiled.
        efficiency: The share of the bound's speed that a run reaches.
        samples: The samples of an epoch, or None for those of the paper's phase.
        fixed_rows: Whether the rows of an update have to stay as they are.
        effort: XLA's optimization level; see `compile_for`.
        say: Called with lines about the progress.

    Raises:
        UserError: Parameters and optimizer fit on no mesh, or no candidate can be compiled.
    """
    began = time.perf_counter()
    waiting = in_turns(list(_candidates(config, topology, fixed_rows)), settings_of(config, topology))
    if not waiting:
        raise UserError(
            f"{name} on {topology.name}: parameters and optimizer fit on no mesh; take more or larger chips"
        )
    say(f"{len(waiting)} candidates whose parameters and optimizer fit")
    done: list[tuple[Plan, str]] = []
    slowest = 0.0
    while waiting and (not done or time.perf_counter() - began + slowest < budget):
        one = waiting.pop(0)
        flags = flags_of(one.settings)
        started = time.perf_counter()
        try:
            plan = plan_training(
                name, one.config, topology, efficiency=efficiency, samples=samples, fixed_rows=True, effort=effort
            )
        except UserError as error:
            say(f"{flags}: {error}")
            continue
        finally:
            slowest = max(slowest, time.perf_counter() - started)
        say(f"{flags}: {report.verdict(plan)}" + (f"; {report.seconds(plan.roofline.bound)}" if plan.roofline else ""))
        done.append((plan, flags))
    if not done:
        raise UserError(f"{name} on {topology.name}: no candidate compiled")
    done.sort(key=_rank)
    left = [f"not compiled, for lack of time (--budget={budget:g}): {len(waiting)} candidates"] if waiting else []
    return SearchResult([plan for plan, _ in done], [flags for _, flags in done], left)


def flags_of(settings: Mapping[str, Any]) -> str:
    """Returns settings as flags: {"batch.rows": 256} gives "--config.batch.rows=256"."""
    return " ".join(f"--config.{field}={value}" for field, value in settings.items())


def settings_of(config: TrainConfig, topology: Topology) -> dict[str, Any]:
    """Returns the settings of the candidate that has the config's own mesh, remat policy and micro-batches."""
    own = {"model.remat": config.model.remat, "batch.accumulation": config.batch.accumulation}
    try:
        mesh = plan_mesh(config, topology).mesh
    except sharding.ShardingError:
        # The config's mesh is made for another number of chips.
        return own
    return own | {f"mesh.{axis}": size for axis, size in mesh.shape.items()}


def in_turns(candidates: Sequence[Candidate], own: Mapping[str, Any]) -> list[Candidate]:
    """Returns the candidates in the order of compilation.

    Candidates whose settings include `own` come first. Then the remat policies take turns, each in the order of its
    estimates: the estimates ignore memory traffic, in which the policies differ most.
    """
    policies: dict[str, list[Candidate]] = {}
    for one in sorted(candidates, key=lambda one: one.seconds):
        policies.setdefault(one.settings["model.remat"], []).append(one)
    turns = [one for turn in itertools.zip_longest(*policies.values()) for one in turn if one is not None]
    return sorted(turns, key=lambda one: not own.items() <= one.settings.items())


def _rank(entry: tuple[Plan, str]) -> tuple[bool, float]:
    plan = entry[0]
    bound = plan.roofline.bound / plan.samples if plan.roofline is not None else float("inf")
    return plan.memory.fits is False, bound


def _candidates(config: TrainConfig, topology: Topology, fixed_rows: bool) -> Iterator[Candidate]:
    model = config.model
    count = len(topology.devices)
    for tensor in _divisors(count):
        # Heads that the axis does not divide would be computed on every chip of the axis.
        if tensor > 1 and (model.decoder.num_heads % tensor or tensor > 8):
            continue
        for fsdp in _divisors(count // tensor):
            yield from _on_mesh(config, topology, model, (count // tensor // fsdp, fsdp, tensor), fixed_rows)


def _on_mesh(
    config: TrainConfig, topology: Topology, model: VlmConfig, shape: tuple[int, int, int], fixed_rows: bool
) -> Iterator[Candidate]:
    axes = dict(zip(sharding.AXES, shape, strict=True))
    changed = config.replace({f"mesh.{axis}": size for axis, size in axes.items()})
    try:
        mesh = plan_mesh(changed, topology).mesh
    except sharding.ShardingError:
        # The slices cannot be arranged in this shape.
        return
    program = build_program(changed, mesh, STEPS)
    state = bytes_per_chip(program.abstract)
    leaves = (*program.abstract.params.values(), *program.abstract.frozen.values())
    # Bytes of all parameters in bfloat16.
    gathered = 2 * sum(leaf.size for leaf in leaves)
    capacity = topology.chip.memory if topology.chip is not None else float("inf")
    if state > capacity:
        return
    for accumulation, remat in itertools.product(ACCUMULATIONS, _KEPT):
        shards, rows = sharding.batch_shards(mesh), changed.batch.rows
        # Rows are fitted to all pieces first, because rows that the micro-batches do not divide are an error.
        whole = changed.replace({"batch.accumulation": 1, "model.remat": remat})
        one, _ = fit_rows(whole, shards * accumulation, fixed=fixed_rows)
        if one.batch.rows % (shards * accumulation) or (accumulation > 1 and one.batch.rows > max(rows, shards * 4)):
            continue
        one = one.replace({"batch.accumulation": accumulation})
        tokens = one.batch.rows * one.batch.tokens // (shards * accumulation)
        kept = tokens * model.decoder.num_layers * model.decoder.hidden_size * 2 * _KEPT[remat] / shape[2]
        if state + kept > capacity:
            continue
        seconds = _estimate(one, topology, program, model, gathered, tokens, accumulation, remat)
        settings: dict[str, Any] = {f"mesh.{axis}": size for axis, size in axes.items()}
        settings |= {"model.remat": remat, "batch.accumulation": accumulation}
        if one.batch.rows != rows:
            settings |= {"batch.rows": one.batch.rows, "samples_per_step": one.samples_per_step}
        yield Candidate(settings, one, seconds / one.samples_per_step)


def _estimate(
    config: TrainConfig,
    topology: Topology,
    program: TrainProgram,
    model: VlmConfig,
    gathered: int,
    tokens: int,
    accumulation: int,
    remat: str,
) -> float:
    """Returns a rough bound on the seconds of an update, from matrix products and the messages for them."""
    replica, fsdp, tensor = (program.mesh.shape[axis] for axis in sharding.AXES)
    if topology.chip is None:
        return float(_REPEATED[remat])
    chip = topology.chip
    needed = model_flops(config, program.trainable) / program.mesh.size
    compute = needed * (1 + _REPEATED[remat] / 4) / chip.peak_flops
    # Weights are gathered in both passes of every micro-batch. Gradients are scattered once, and reduced over replicas.
    weights = gathered / tensor
    gathers = weights * (fsdp - 1) / fsdp * (2 * accumulation + 1)
    copies = 2 * weights / fsdp * (replica - 1) / replica
    # Each layer has two sums of activations per pass, over the chips that share the layer.
    layers = accumulation * model.decoder.num_layers * (4 + 2 * _REPEATED[remat])
    shared = layers * 2 * (tensor - 1) / tensor * tokens * model.decoder.hidden_size * 2
    sent = (
        gathers / topology.bandwidth(fsdp * tensor, tensor)
        + copies / topology.bandwidth(program.mesh.size, tensor)
        + shared / topology.bandwidth(tensor, tensor)
    )
    return max(compute, sent, _across(topology, replica, copies, gathers) / chip.network)


def _across(topology: Topology, replica: int, copies: float, gathers: float) -> float:
    """Returns the bytes that a chip sends to other slices: sums of gradients, or everything where `fsdp` crosses."""
    share = (topology.slices - 1) / topology.slices
    return share * (copies if replica % topology.slices == 0 else gathers + copies)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
