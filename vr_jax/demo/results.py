"""Reads what the commands of the demo wrote, and makes the page that compares the systems."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vr_jax.data.demo.pages import KINDS
from vr_jax.data.demo.reading import HELD_OUT
from vr_jax.demo.commands import DATA, PHASES
from vr_jax.demo.systems import DemoSystem
from vr_jax.errors import UserError
from vr_jax.evaluation import (
    PAPER_SCORES,
    BenchmarkScores,
    ComparedRun,
    Comparison,
    Estimate,
    Item,
    ItemResult,
    PaperRow,
    ReportItem,
    RunScores,
    Tile,
    compared_curves,
    compared_rows,
    get_benchmark,
    load_results,
    maps_of_items,
    score_rows,
    with_baselines,
    write_report,
)
from vr_jax.inference import Generator, load_for_inference
from vr_jax.storage import Path
from vr_jax.training import EXPORT_FOLDER, METRICS_FILE, read_metrics

BENCHMARK = "chartqa"
ITEMS = 24  # The items that the page shows.
NOTES = (
    "All systems start from the same encoder and the same decoder, see the same pages in the same order, and have the "
    "same schedule. Only the projector and the re-fusion block differ. Held-out pages have other words, digits and "
    "heights than the training pages.",
    "The tasks favour methods that carry detail past the compressed tokens: an answer hangs on one patch of 8 x 8 "
    "pixels, and the average over a window of 3 x 3 or 4 x 4 patches does not say which of its characters is "
    "highlighted. Natural images ask for less of that, and the paper's differences are smaller.",
    "One run has one seed. docs/results/reading.md has three seeds of every system.",
)
NOTE_ON_TOKEN_PACKER = (
    "TokenPacker stands beside as a projector that reads several levels of the encoder by attention, before the "
    "decoder. The schedule was chosen for Vision Remember, on pages of other seeds, and in these few updates the "
    "attention of TokenPacker seldom forms. With more updates it reads too (docs/results/reading.md), and in the "
    "longer miniature of docs/results/accuracy.md it is ahead of Vision Remember. The paper's Table 4 compares the two "
    "on real images."
)


@dataclass(frozen=True)
class SystemResult:
    """What the commands of one system wrote.

    Attributes:
        system: The system.
        folder: Its folder.
        scores: The scores, with the most frequent answers as baselines.
        answers: The result of every item by id.
        losses: The loss of every step of each phase.
    """

    system: DemoSystem
    folder: Path
    scores: BenchmarkScores
    answers: Mapping[str, ItemResult]
    losses: Mapping[str, Sequence[tuple[int, float]]]

    @property
    def model(self) -> Path:
        """The trained model."""
        return self.folder / PHASES[-1] / EXPORT_FOLDER

    @property
    def columns(self) -> dict[str, Estimate]:
        """The score of all items under "all", and those of each kind of page."""
        return {"all": self.scores.overall, **{kind: self.scores.categories[kind] for kind in KINDS}}


def read_result(system: DemoSystem, workdir: Path) -> SystemResult:
    """Reads the result of a system.

    Raises:
        UserError: A file is missing or cannot be read.
    """
    folder = workdir / system.name
    summary = _read_json(folder / "eval" / "summary.json")
    results = load_results(folder / "eval" / BENCHMARK)
    rows = score_rows([_report_item(one) for one in results])
    run = RunScores.from_summary(with_baselines(summary, BENCHMARK, rows))
    losses = {
        phase: [(record["step"], record["loss"]) for record in read_metrics(folder / phase / METRICS_FILE)]
        for phase in PHASES
    }
    return SystemResult(system, folder, run.benchmarks[0], {one.id: one for one in results}, losses)


def first_that_remembers(results: Sequence[SystemResult]) -> SystemResult:
    """The first result of a system with Vision Remember, whose model the demo shows."""
    return next(one for one in results if one.system.remembers)


def write_page(
    path: Path, results: Sequence[SystemResult], workdir: Path, settings: Mapping[str, object], *, items: int = ITEMS
) -> None:
    """Writes the page of the demo.

    Args:
        path: The HTML file.
        results: The results of the systems. Of the first that remembers, the page shows items and heat maps.
        workdir: The folder of the demo.
        settings: What the page shows below as settings.
        items: The number of items that the page shows.

    Raises:
        UserError: A model cannot be loaded or the page cannot be written.
    """
    by_name = {one.system.name: one for one in results}
    runs = [
        ComparedRun(
            one.system.title, f"1/{one.system.ratio} of the patches", one.system.remembers, one.columns, one.losses
        )
        for one in sorted(results, key=lambda one: (one.system.ratio, one.system.title))
    ]
    columns = ("all", *KINDS)
    own = first_that_remembers(results)
    ratio = own.system.ratio
    rivals = [one for one in results if one.system.ratio == ratio and one is not own]
    shown, won = _won_items(own, rivals, workdir, items)
    comparison = Comparison(
        lead=(
            "A vision-language model that reads an image through few tokens forgets detail. Here it keeps one vision "
            "token for nine or sixteen patches. Vision Remember lets these tokens re-read the encoder's features "
            "between the decoder's layers."
        ),
        tiles=_tiles(by_name),
        columns=columns,
        groups=compared_rows(runs, columns),
        baselines=tuple(f"{own.columns[name].baseline or 0:.1f}" for name in columns),
        paper_title="The same comparison in the paper: Table 2, Qwen2-0.5B on eleven benchmarks",
        paper_head=("system", "vision tokens", "General", "Knowledge", "OCR & Chart", "average"),
        paper_rows=_paper_rows(),
        curves=compared_curves(runs),
        notes=(*NOTES, NOTE_ON_TOKEN_PACKER) if any("token_packer" in name for name in by_name) else NOTES,
        items_note=(
            f"{won} of {len(own.answers)} questions are answered by Vision Remember at 1/{ratio} "
            + (f"and by no other system at 1/{ratio}" if rivals else f"(no other system at 1/{ratio} was trained)")
            + f"; this page shows {len(shown)} of them. The heat maps show where each insertion re-read."
        ),
        commands=_commands(own, workdir),
    )
    summary = _read_json(own.folder / "eval" / "summary.json")
    write_report(
        path,
        title="Vision Remember against pooling: pages to read",
        summary=summary,
        items=shown,
        settings=settings,
        comparison=comparison,
    )


def _tiles(results: Mapping[str, SystemResult]) -> tuple[Tile, ...]:
    tiles = []
    for ours_result in (one for one in results.values() if one.system.remembers):
        ratio, ours = ours_result.system.ratio, ours_result.scores.overall
        note = ""
        if pooling := results.get(f"pooling_{ratio}"):
            pooled = pooling.scores.overall
            note = f"pooling alone {pooled.score:.1f} %: {ours.score - pooled.score:+.1f} points"
        tiles.append(Tile(f"Vision Remember at 1/{ratio}", f"{ours.score:.1f} %", note))
    if packed := results.get("token_packer_9"):
        score = f"{packed.scores.overall.score:.1f} %"
        tiles.append(Tile("TokenPacker at 1/9", score, "a projector with attention, alone"))
    return tuple(tiles)


def _paper_rows() -> tuple[tuple[str, ...], ...]:
    rows = []
    for ratio in (4, 9, 16):
        for suffix in ("", "_vr"):
            row = PaperRow("table2", f"ratio{ratio}{suffix}", "0.5b")
            scores = PAPER_SCORES[row]
            rows.append(
                (
                    "pooling + Vision Remember" if suffix else "pooling",
                    f"1/{ratio}",
                    *(f"{score:.1f}" for score in (*scores.groups.values(), scores.average)),
                )
            )
    return tuple(rows)


def _commands(own: SystemResult, workdir: Path) -> tuple[tuple[str, str], ...]:
    pages = workdir / DATA / HELD_OUT
    with (pages / "test.jsonl").open() as lines:
        page = json.loads(lines.readline())
    return (
        (
            "Ask the model about a page yourself:",
            shlex.join(
                ["vr-jax", "chat", f"--checkpoint={own.model}", f"--image={pages / page['image']}", page["question"]]
            ),
        ),
        (
            "See how much Vision Remember adds to the work of a prefill:",
            shlex.join(["vr-jax", "efficiency", f"--checkpoint={own.model}"]),
        ),
        (
            "Plan the real training, without a single accelerator:",
            "vr-jax plan --config=configs/llava_vr_qwen2_0_5b.py:phase2 --topology=h100:1x1x8",
        ),
    )


def _won_items(
    own: SystemResult, others: Sequence[SystemResult], workdir: Path, count: int
) -> tuple[list[ReportItem], int]:
    """Items that only Vision Remember answers at its ratio, of all kinds in turn, with heat maps; and how many are."""
    benchmark = get_benchmark(BENCHMARK)
    items = {item.id: item for item in benchmark.items(workdir / DATA / HELD_OUT)}
    by_kind: dict[str, list[Item]] = {}
    for name, result in own.answers.items():
        if result.score == 1 and all(one.answers[name].score == 0 for one in others):
            by_kind.setdefault(result.category, []).append(items[name])
    kinds = [by_kind.get(kind, []) for kind in KINDS]
    turns = range(max(map(len, kinds), default=0))
    chosen = [found[turn] for turn in turns for found in kinds if turn < len(found)][:count]
    if not chosen:
        return [], sum(map(len, kinds))
    loaded = load_for_inference(own.model)
    generator = Generator(loaded.model, loaded.tokenizer)
    maps = maps_of_items(generator, loaded.processor, benchmark, chosen, batch_size=count, progress=False)
    found_items = [
        _report_item(
            own.answers[item.id],
            images=item.images,
            maps=found,
            others=tuple((one.system.title, one.answers[item.id].prediction or "") for one in others),
        )
        for item, found in zip(chosen, maps, strict=True)
    ]
    return found_items, sum(map(len, kinds))


def _report_item(result: ItemResult, **fields: Any) -> ReportItem:
    return ReportItem(
        id=result.id,
        category=result.category,
        question=result.question,
        references=tuple(result.answers),
        prediction=result.prediction,
        score=result.score,
        benchmark=BENCHMARK,
        error=result.error,
        **fields,
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}; run the demo again") from None
    return found
