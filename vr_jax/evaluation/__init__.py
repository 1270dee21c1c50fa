"""Evaluation of models on benchmarks.

`evaluate` is the way from a checkpoint and the names of benchmarks to scores. `evaluate_items` answers and scores items
with a model that is already loaded, and an `Evaluator` does so with the parameters of a running training.
`own_benchmark` makes a benchmark of a file of one's own. The modules of `benchmarks/` say what is asked and how it is
scored, and `report/` writes the HTML page.
"""

from vr_jax.evaluation.attention_maps import heat_maps, maps_of_items, of_image, placed_tiles, rereads
from vr_jax.evaluation.benchmarks import BENCHMARKS, PAPER, get_benchmark
from vr_jax.evaluation.benchmarks.own import OwnQuestions, own_benchmark
from vr_jax.evaluation.chosen import benchmark_names, chosen_benchmarks
from vr_jax.evaluation.evaluate import Outcome, evaluate, fingerprint, write_run_report
from vr_jax.evaluation.evaluator import Evaluator
from vr_jax.evaluation.held_out import held_out_questions
from vr_jax.evaluation.interface import PROFILES, Benchmark, Item, ItemResult, Profile
from vr_jax.evaluation.metrics.named import METRICS
from vr_jax.evaluation.overall import score_table
from vr_jax.evaluation.paper_scores import PAPER_SCORES, PaperRow
from vr_jax.evaluation.report import (
    GRADIENT,
    BenchmarkScores,
    ComparedRun,
    Comparison,
    Estimate,
    HeatMap,
    ReportItem,
    RunScores,
    ScoreRow,
    Tile,
    compared_curves,
    compared_rows,
    heat_png,
    score_rows,
    with_baselines,
    write_report,
)
from vr_jax.evaluation.run_directory import load_results
from vr_jax.evaluation.runner import Evaluation, NothingAsked, evaluate_items

__all__ = [
    "BENCHMARKS",
    "GRADIENT",
    "METRICS",
    "PAPER",
    "PAPER_SCORES",
    "PROFILES",
    "Benchmark",
    "BenchmarkScores",
    "ComparedRun",
    "Comparison",
    "Estimate",
    "Evaluation",
    "Evaluator",
    "HeatMap",
    "Item",
    "ItemResult",
    "NothingAsked",
    "Outcome",
    "OwnQuestions",
    "PaperRow",
    "Profile",
    "ReportItem",
    "RunScores",
    "ScoreRow",
    "Tile",
    "benchmark_names",
    "chosen_benchmarks",
    "compared_curves",
    "compared_rows",
    "evaluate",
    "evaluate_items",
    "fingerprint",
    "get_benchmark",
    "heat_maps",
    "heat_png",
    "held_out_questions",
    "load_results",
    "maps_of_items",
    "of_image",
    "own_benchmark",
    "placed_tiles",
    "rereads",
    "score_rows",
    "score_table",
    "with_baselines",
    "write_report",
    "write_run_report",
]
