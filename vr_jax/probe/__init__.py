"""A probe of visual information (the paper's Figure 1b).

Small classifiers are trained on the vision tokens of a frozen model at several places, from the encoder to the last
decoder layer. Their accuracies show where information about the image is lost (`docs/design/methods.md#probe`).
"""

from vr_jax.probe.plot import differences, draw, labels_of
from vr_jax.probe.results import RESULTS, ProbeResult, TapResult, read_results, table
from vr_jax.probe.run import FIGURE, output_folder, probe_settings, run_probe
from vr_jax.probe.stand_in import CLASS_NAMES, write_stand_in

__all__ = [
    "CLASS_NAMES",
    "FIGURE",
    "RESULTS",
    "ProbeResult",
    "TapResult",
    "differences",
    "draw",
    "labels_of",
    "output_folder",
    "probe_settings",
    "read_results",
    "run_probe",
    "table",
    "write_stand_in",
]
