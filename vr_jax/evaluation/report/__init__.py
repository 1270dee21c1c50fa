"""One self-contained HTML page of a run: scores beside the paper's, by category, and its items with their images."""

from vr_jax.evaluation.report.heat import HeatMap, heat_png
from vr_jax.evaluation.report.items import ReportItem, ScoreRow, score_rows
from vr_jax.evaluation.report.page import write_report
from vr_jax.evaluation.report.plots import loss_curve
from vr_jax.evaluation.report.scores import with_baselines

__all__ = [
    "HeatMap",
    "ReportItem",
    "ScoreRow",
    "heat_png",
    "loss_curve",
    "score_rows",
    "with_baselines",
    "write_report",
]
