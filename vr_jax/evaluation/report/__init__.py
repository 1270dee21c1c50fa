"""The report of an evaluation: one HTML page that needs no other file and no network.

It shows the scores beside those of the paper, the scores by category, and items with their images. The markup is in
`templates/` (Jinja, with autoescape); the modules of this package compute what the templates show.
"""

from vr_jax.evaluation.report.comparison import ComparedRun, Comparison, Tile, compared_curves, compared_rows
from vr_jax.evaluation.report.heat import GRADIENT, HeatMap, heat_png
from vr_jax.evaluation.report.items import ReportItem, ScoreRow, score_rows
from vr_jax.evaluation.report.page import write_report
from vr_jax.evaluation.report.scores import BenchmarkScores, Estimate, RunScores, with_baselines

__all__ = [
    "GRADIENT",
    "BenchmarkScores",
    "ComparedRun",
    "Comparison",
    "Estimate",
    "HeatMap",
    "ReportItem",
    "RunScores",
    "ScoreRow",
    "Tile",
    "compared_curves",
    "compared_rows",
    "heat_png",
    "score_rows",
    "with_baselines",
    "write_report",
]
