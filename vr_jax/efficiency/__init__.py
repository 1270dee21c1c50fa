"""Time to first token, decoding speed and memory of several models side by side (the paper's Table 5d and Figure 4)."""

from vr_jax.efficiency.measurement import measure, measure_isolated
from vr_jax.efficiency.report import JSON, MARKDOWN, PLOT, text, write
from vr_jax.efficiency.results import EfficiencySettings, Measurement, Report
from vr_jax.efficiency.scores import parse_scores
from vr_jax.efficiency.systems import IMAGE_CHOICES, Kind, Source, System, read_systems

__all__ = [
    "IMAGE_CHOICES",
    "JSON",
    "MARKDOWN",
    "PLOT",
    "EfficiencySettings",
    "Kind",
    "Measurement",
    "Report",
    "Source",
    "System",
    "measure",
    "measure_isolated",
    "parse_scores",
    "read_systems",
    "text",
    "write",
]
