"""`vr-jax train`: trains the model of a config file, or continues a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vr_jax import distributed
from vr_jax.cli.flags import Command, flag
from vr_jax.cli.shared import CONFIG_HELP, ProcessFlags, start_processes
from vr_jax.compilation import use_compilation_cache
from vr_jax.fields import NoEffect
from vr_jax.path_text import FileVariantText, PathText
from vr_jax.settings import TRAINING, load_config
from vr_jax.storage import as_path
from vr_jax.training import export_best, export_newest, train


@dataclass(frozen=True, kw_only=True)
class TrainFlags(ProcessFlags):
    """The flags of `vr-jax train`."""

    no_effect: ClassVar = (
        NoEffect(("export_only",), "export_best", lambda flags: flags.export_best, "give one of the two"),
    )

    config: FileVariantText = flag(help=CONFIG_HELP, metavar="FILE[:VARIANT]")
    overrides: tuple[str, ...] = flag((), "Sets a field of the config.", overrides=True)
    workdir: PathText = flag(help="Folder for checkpoints, metrics and the final model directory.", metavar="DIR")
    export_only: bool = flag(False, "Write WORKDIR/model from the newest checkpoint, without training.")
    export_best: bool = flag(
        False, "Write WORKDIR/model_best from the best checkpoint (config.checkpoint.best), without training."
    )


def run(flags: TrainFlags) -> None:
    """Trains or exports."""
    start_processes(flags)
    use_compilation_cache()
    config = distributed.together(lambda: load_config(flags.config, flags.overrides, sections=TRAINING))
    workdir = as_path(flags.workdir)
    if flags.export_best:
        export_best(config, workdir)
    elif flags.export_only:
        export_newest(config, workdir)
    else:
        train(config, workdir)


COMMAND = Command(
    summary="Train the model of a config, or continue a run that was stopped.",
    flags=TrainFlags,
    run=run,
    details="""The same command continues a run from its newest checkpoint. The final model is in WORKDIR/model, which
    chat, generate and eval read.

    Exit codes: 0 done; 2 a mistake in the settings; 3 a loss, gradient or parameter that is not finite; 4 too many
    unusable samples; 75 stopped by SIGTERM or SIGINT after saving, and the same command continues.""",
    examples=(
        "vr-jax train --config=configs/demo.py --workdir=runs/mine --config.optimizer.lr=1e-3",
        "vr-jax train --config=configs/demo.py --workdir=runs/own --config.data.path=my_data/data.json "
        "--config.data.images=my_data/images",
        "vr-jax train --config=configs/llava_vr_qwen2_0_5b.py:phase1 --workdir=runs/phase1",
    ),
    verbose=True,
)
