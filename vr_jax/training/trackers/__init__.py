"""Where the numbers of a run go: `metrics.jsonl` always, TensorBoard, and the trackers that the settings name.

A tracker is one file here (`protocol.py` says what it does). `Trackers` gives everything to all of them.
"""

from vr_jax.training.trackers.choice import check_trackers, open_trackers
from vr_jax.training.trackers.group import Trackers
from vr_jax.training.trackers.jsonl import METRICS_FILE, read_metrics
from vr_jax.training.trackers.protocol import TENSORBOARD_FOLDER, CaptionedImage, TrackedRun, Tracker

__all__ = [
    "METRICS_FILE",
    "TENSORBOARD_FOLDER",
    "CaptionedImage",
    "TrackedRun",
    "Tracker",
    "Trackers",
    "check_trackers",
    "open_trackers",
    "read_metrics",
]
