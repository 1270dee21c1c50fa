"""What `--model_args` may hold."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vr_jax.errors import UserError

DEFAULT_BATCH_SIZE = 16

logger = logging.getLogger("vr_jax.evaluation")


@dataclass(frozen=True, kw_only=True)
class Options:
    """checkpoint: a model directory; also named `pretrained`, as other models of lmms-eval call it."""

    checkpoint: Path
    dtype: str | None = None  # "float32" or "bfloat16"; as saved
    pruning: str | Mapping[str, Any] | None = None  # see `with_pruning`
    max_new_tokens: int | None = None  # in place of the tasks'
    cut_at_until: bool = False  # end replies at the tasks' `until`; lmms-eval's own models do not
    seed: int = 0  # of the random draws at a temperature above 0
    replica: int = 1  # sizes of the mesh, -1: the remaining devices
    fsdp: int = -1
    tensor: int = 1
    batch_size: int = DEFAULT_BATCH_SIZE  # requests per batch over all devices

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Options:
        """From the arguments that lmms-eval gives: those of --model_args, and --batch_size, --max_batch_size and
        --device if they are set.

        Raises UserError for an unknown name, a value of the wrong type, or a missing checkpoint."""
        values = {name: value for name, value in arguments.items() if value is not None}
        device = values.pop("device", None)
        if device is not None:
            logger.warning("device=%s has no effect: JAX takes all devices (JAX_PLATFORMS=cpu for the CPU)", device)
        values.pop("max_batch_size", None)  # a bound of batch_size=auto, which is a fixed number here
        if "pretrained" in values:
            if "checkpoint" in values:
                raise UserError("checkpoint and pretrained are two names of one argument: give one of them")
            values["checkpoint"] = values.pop("pretrained")
        known = [one.name for one in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise UserError(f"model_args: unknown {unknown}; known: {', '.join(known)}")
        if "checkpoint" not in values:
            raise UserError("missing: --model_args checkpoint=DIR, a model directory of vr_jax")
        values["checkpoint"] = Path(str(values["checkpoint"])).expanduser()
        if str(values.get("batch_size", "")).startswith("auto"):
            values["batch_size"] = DEFAULT_BATCH_SIZE
        if values.get("dtype") == "auto":
            del values["dtype"]
        for name in ("max_new_tokens", "batch_size", "seed", "replica", "fsdp", "tensor"):
            if name in values:
                values[name] = _integer(name, values[name])
        for name in ("max_new_tokens", "batch_size"):
            if values.get(name, 1) < 1:
                raise UserError(f"{name} = {values[name]}: expected at least 1")
        if not isinstance(values.get("cut_at_until", False), bool):
            raise UserError(f"cut_at_until = {values['cut_at_until']!r}: expected true or false")
        if values.get("batch_size") == 1:
            logger.warning("batch size 1 (lmms-eval's default): --batch_size %d is faster", DEFAULT_BATCH_SIZE)
        return cls(**values)


def _integer(name: str, value: Any) -> int:
    """lmms-eval hands over "-1" as -1.0."""
    try:
        if int(value) == float(value):
            return int(value)
    except (TypeError, ValueError):
        pass
    raise UserError(f"{name} = {value!r}: expected a whole number")
