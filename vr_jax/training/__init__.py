"""Training: the loop, the state and the update, checkpoints, and the numbers that a run writes.

`train` runs a `TrainConfig`. The parts below it are what the planner compiles and what benchmarks measure.
"""

from vr_jax.training.batch_size import fit_batch, raise_rows
from vr_jax.training.flops import PEAK_FLOPS, StepFlops, forward_flops, peak_flops, step_flops
from vr_jax.training.inputs import Inputs, check_batch, init_directories, open_inputs, open_samples, put_batch
from vr_jax.training.loop import export_best, export_newest, train
from vr_jax.training.not_finite import NotFinite
from vr_jax.training.optimizer import make_optimizer, make_schedule, moments
from vr_jax.training.program import (
    TrainProgram,
    abstract_batch,
    build_program,
    check_globs,
    choose_run_mesh,
    total_steps,
)
from vr_jax.training.run_record import EXPORT_FOLDER, versions
from vr_jax.training.state import ModelTree, TrainState, abstract_state, create_state, parameter_count
from vr_jax.training.step import batch_counts, make_train_step
from vr_jax.training.stopping import Preempted
from vr_jax.training.trackers import METRICS_FILE, read_metrics

__all__ = [
    "EXPORT_FOLDER",
    "METRICS_FILE",
    "PEAK_FLOPS",
    "Inputs",
    "ModelTree",
    "NotFinite",
    "Preempted",
    "StepFlops",
    "TrainProgram",
    "TrainState",
    "abstract_batch",
    "abstract_state",
    "batch_counts",
    "build_program",
    "check_batch",
    "check_globs",
    "choose_run_mesh",
    "create_state",
    "export_best",
    "export_newest",
    "fit_batch",
    "forward_flops",
    "init_directories",
    "make_optimizer",
    "make_schedule",
    "make_train_step",
    "moments",
    "open_inputs",
    "open_samples",
    "parameter_count",
    "peak_flops",
    "put_batch",
    "raise_rows",
    "read_metrics",
    "step_flops",
    "total_steps",
    "train",
    "versions",
]
