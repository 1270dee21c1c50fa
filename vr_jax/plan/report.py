"""Writes plans as text for a terminal, as Markdown, and as files."""

from __future__ import annotations

import json
from collections.abc import Sequence

from vr_jax.plan.results import Plan
from vr_jax.storage import Path, write_text

JSON, MARKDOWN = "plan.json", "plan.md"
GIB = 2**30
NAMES = {
    "compute": "FLOP/s",
    "hbm": "HBM bandwidth",
    "interconnect": "interconnect",
    "network": "network between slices",
}
RUN = {"train": "update", "prefill": "prefill", "decode": "decoded token"}


def size(count: float | None) -> str:
    """Returns a number of bytes in KiB, MiB or GiB."""
    if count is None:
        return "unknown"
    for unit, name in ((GIB, "GiB"), (2**20, "MiB")):
        if count >= unit:
            return f"{count / unit:,.2f} {name}"
    return f"{count / 1024:,.1f} KiB"


def seconds(value: float) -> str:
    """Returns a time in s, ms or us."""
    return f"{value:,.3g} s" if value >= 1 else f"{value * 1e3:,.3g} ms" if value >= 1e-3 else f"{value * 1e6:,.3g} us"


def verdict(plan: Plan) -> str:
    """Returns a phrase that says whether the plan fits, and how much room is left."""
    memory = plan.memory
    if memory.fits is None or memory.capacity is None:
        return "this chip's memory is not known"
    if memory.fits:
        assert memory.peak is not None
        room = memory.capacity - memory.peak
        return f"fits: {size(room)} of {size(memory.capacity)} are left ({room / memory.capacity:.0%})"
    needed = f"{size(memory.peak)} needed" if memory.peak is not None else "the compiler gave up"
    return f"DOES NOT FIT: {needed}, {size(memory.capacity)} available"


def facts(plan: Plan) -> list[tuple[str, str]]:
    """Returns the lines of a plan as names and values; empty names separate groups."""
    memory, run = plan.memory, RUN[plan.mode]
    rows = [
        ("config", plan.config),
        ("topology", f"{plan.topology}, {plan.chips} devices, mesh {mesh_of(plan)}"),
        ("settings", ", ".join(f"{name} {value}" for name, value in plan.settings.items())),
        *[("note", note) for note in plan.notes],
        ("parameters", f"{plan.parameters / 1e6:,.1f} M" + _trained(plan)),
        (f"tokens, samples per {run}", f"{plan.tokens:,}, {plan.samples:,g}"),
        ("", ""),
        ("memory per chip", verdict(plan)),
    ]
    kinds = [
        ("  trained parameters", memory.trained),
        ("  frozen parameters" if plan.mode == "train" else "  parameters", memory.frozen),
        ("  optimizer", memory.optimizer),
        ("    first moments", memory.first_moments),
        ("    second moments", memory.second_moments),
        ("  keys and values", memory.cache),
        ("  batch and counters" if plan.mode == "train" else "  prompts and state", memory.inputs),
    ]
    rows += [(name, size(count)) for name, count in kinds if count]
    if memory.temporaries is not None:
        what = "gradients, activations, temporaries" if plan.mode == "train" else "activations, temporaries"
        rows += [
            (f"  {what}", size(memory.temporaries)),
            *([("    gradients", size(memory.gradients))] if memory.gradients else []),
            ("  results that replace nothing, code", f"{size(memory.results)}, {size(memory.code)}"),
            ("  peak", size(memory.peak)),
        ]
    if plan.work is not None:
        work = plan.work
        sent, across = (
            {kind: count for kind, count in found.items() if count >= 1}
            for found in (work.collective_bytes, work.network_bytes)
        )
        rows += [
            ("", ""),
            (f"per {run} and chip", ""),
            ("  operations", f"{work.flops / 1e12:,.4g} TFLOP ({_share(plan)})"),
            ("  of these the model needs", f"{work.model_flops / 1e12:,.4g} TFLOP"),
            ("  HBM read and written", f"{work.hbm_bytes / 1e9:,.4g} GB"),
            ("  sent to other chips", f"{sum(sent.values()) / 1e9:,.4g} GB"),
            *[(f"    {kind}", f"{count / 1e9:,.4g} GB") for kind, count in sent.items()],
        ]
        if across:
            rows += [
                ("  sent to other slices", f"{sum(across.values()) / 1e9:,.4g} GB"),
                *[(f"    {kind} across", f"{count / 1e9:,.4g} GB") for kind, count in across.items()],
            ]
    if plan.roofline is not None:
        roof = plan.roofline
        rows += [
            ("", ""),
            ("at least, by FLOP/s", f"{seconds(roof.compute)}  ({_peak(plan):,.0f} TFLOP/s)"),
            ("at least, by HBM bandwidth", seconds(roof.hbm)),
            ("at least, by interconnect", seconds(roof.interconnect)),
            *([("at least, by network between slices", seconds(roof.network))] if roof.network else []),
            (f"bound of one {run}", f"{seconds(roof.bound)}, by {NAMES[roof.limit]}"),
            ("bound of MFU", f"{roof.mfu:.1%}"),
            ("tokens/s, samples/s at the bound", f"{plan.tokens / roof.bound:,.0f}, {plan.samples / roof.bound:,.1f}"),
        ]
    if plan.schedule is not None:
        schedule = plan.schedule
        rows.append(("an epoch", f"{schedule.samples:,} samples, {schedule.steps:,} updates"))
        if schedule.days is not None:
            days = f"{schedule.days:,.3f} days" if schedule.days < 0.1 else f"{schedule.days:,.2f} days"
            rows.append((f"  at {schedule.efficiency:.0%} of the bound's speed", days))
    rows += [
        ("", ""),
        ("compiled in", f"{plan.compile_seconds:,.0f} s; " + ", ".join(f"{k} {v}" for k, v in plan.versions.items())),
    ]
    return rows


def text(plan: Plan) -> str:
    """Returns a plan as aligned lines for a terminal."""
    rows = facts(plan)
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in rows)


def markdown(plan: Plan) -> str:
    """Returns a plan as a page of Markdown."""
    lines = [f"| {name.strip()} | {value} |" for name, value in facts(plan) if name]
    return "\n".join([f"# Plan: {plan.mode} on {plan.topology}", "", "| | |", "|---|---|", *lines, ""])


COLUMNS = ("config", "topology", "mesh", "rows", "remat", "state", "temporaries", "peak", "fits", "TFLOP", "HBM, GB")
MORE_COLUMNS = ("sent, GB", "to other slices, GB", "bound", "by", "MFU", "samples/s", "days", "compiled in")


def table(plans: Sequence[Plan]) -> list[list[str]]:
    """Returns a header and one row per plan, with memory in GiB per chip and work per chip and run."""
    rows = [[*COLUMNS, *MORE_COLUMNS]]
    for plan in plans:
        memory, work, roof = plan.memory, plan.work, plan.roofline
        first = [
            plan.config.rsplit("/", 1)[-1].replace(".py", "").replace("llava_vr_qwen2_", ""),
            plan.topology,
            " x ".join(str(count) for count in plan.mesh.values()),
            _rows(plan),
            str(plan.settings.get("remat", "")),
            f"{memory.arguments / GIB:.2f}",
            "" if memory.temporaries is None else f"{memory.temporaries / GIB:.2f}",
            "" if memory.peak is None else f"{memory.peak / GIB:.2f}",
            {True: "yes", False: "**no**", None: "?"}[memory.fits],
        ]
        if work is None:
            first += [""] * 2
            rest = [""] * 7
        else:
            first += [f"{work.flops / 1e12:.2f}", f"{work.hbm_bytes / 1e9:.0f}"]
            sent, across = (sum(found.values()) for found in (work.collective_bytes, work.network_bytes))
            rest = [f"{sent / 1e9:.1f}", f"{across / 1e9:.2f}", *[""] * 5]
        if roof is not None:
            days = plan.schedule.days if plan.schedule is not None else None
            rest[2:] = [
                seconds(roof.bound),
                NAMES[roof.limit].split()[0],
                f"{roof.mfu:.0%}",
                f"{plan.samples / roof.bound:,.0f}",
                "" if days is None else f"{days:.3f}",
            ]
        rows.append([*first, *rest, f"{plan.compile_seconds:.0f} s"])
    return rows


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Returns rows, of which the first is the header, as a table of Markdown."""
    rule = ["---", "---", *["---:"] * (len(rows[0]) - 2)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))


def write(directory: Path, plans: Sequence[Plan], page: str) -> None:
    """Writes plan.json and plan.md, each complete or absent.

    Args:
        directory: The folder of the results.
        plans: The plans for plan.json, the best first.
        page: The text of plan.md.

    Raises:
        OSError: A file cannot be written.
    """
    data = [plan.to_dict() for plan in plans]
    write_text(directory / JSON, json.dumps(data, indent=2) + "\n")
    write_text(directory / MARKDOWN, page)


def mesh_of(plan: Plan) -> str:
    """Returns the mesh of a plan in words."""
    return " x ".join(f"{name} {count}" for name, count in plan.mesh.items())


def _trained(plan: Plan) -> str:
    return f", {plan.trained_parameters / 1e6:,.1f} M of them trained" if plan.mode == "train" else ""


def _share(plan: Plan) -> str:
    assert plan.work is not None
    return f"{plan.work.flops / plan.work.asked_flops:.2f} x what the program asks for, over {plan.chips} chips"


def _rows(plan: Plan) -> str:
    if plan.mode != "train":
        return str(plan.settings["batch"])
    accumulation = plan.settings["accumulation"]
    return f"{plan.settings['rows']}" + (f" / {accumulation}" if accumulation > 1 else "")


def _peak(plan: Plan) -> float:
    """Returns the chip's peak in TFLOP/s, from the plan's roofline."""
    assert plan.roofline is not None
    assert plan.work is not None
    return plan.work.flops / plan.roofline.compute / 1e12
