"""The arguments that lmms-eval gives to the model, from `--model_args` and its own flags."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vr_jax.errors import UserError
from vr_jax.hub import local_folder
from vr_jax.storage import Path

DEFAULT_BATCH_SIZE = 16

logger = logging.getLogger("vr_jax.evaluation")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The arguments of the model.

    Attributes:
        checkpoint: The model directory. Other models of lmms-eval call this argument `pretrained`, which is accepted.
        dtype: The dtype of parameters and activations, "float32" or "bfloat16". None keeps that of the directory.
        pruning: A pruner (see `inference.with_pruning`), or None.
        max_new_tokens: The largest number of tokens of a reply, which replaces the limits of the tasks. None keeps
            them.
        cut_at_until: Whether replies end at the strings `until` of a task. Other models of lmms-eval ignore these.
        seed: The seed of the random draws at a temperature above 0.
        replica: The number of copies of the parameters; -1 takes the remaining devices.
        fsdp: The number of devices that share the parameters of a copy; -1 takes the remaining devices.
        tensor: The number of devices that share each layer's computation; -1 takes the remaining devices.
        batch_size: The number of requests in a batch, over all devices.
    """

    checkpoint: Path
    dtype: Literal["float32", "bfloat16"] | None = None
    pruning: str | Mapping[str, Any] | None = None
    max_new_tokens: int | None = None
    cut_at_until: bool = False
    seed: int = 0
    replica: int = 1
    fsdp: int = -1
    tensor: int = 1
    batch_size: int = DEFAULT_BATCH_SIZE

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Options:
        """Reads the arguments that lmms-eval gives.

        Args:
            arguments: The pairs of --model_args, and --batch_size, --max_batch_size and --device if they are set.

        Raises:
            UserError: A name is unknown, a value has the wrong type, or the checkpoint is missing.
        """
        values = {name: value for name, value in arguments.items() if value is not None}
        device = values.pop("device", None)
        if device is not None:
            logger.warning(
                "device=%s has no effect, because JAX takes all devices; JAX_PLATFORMS=cpu chooses the CPU", device
            )
        values.pop("max_batch_size", None)  # It limits batch_size=auto, which is a fixed number here.
        if "pretrained" in values:
            if "checkpoint" in values:
                raise UserError("checkpoint and pretrained are two names of one argument; set only one of them")
            values["checkpoint"] = values.pop("pretrained")
        known = [one.name for one in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise UserError(f"model_args has the unknown names {unknown}; known: {', '.join(known)}")
        if "checkpoint" not in values:
            raise UserError(
                "the checkpoint is missing: set --model_args checkpoint=DIR, where DIR is a model directory of vr_jax"
            )
        values["checkpoint"] = local_folder(str(values["checkpoint"]))
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
            logger.warning(
                "the batch size is 1, the default of lmms-eval; --batch_size %d is faster", DEFAULT_BATCH_SIZE
            )
        return cls(**values)


def _integer(name: str, value: Any) -> int:
    """Converts a value to an integer. lmms-eval passes "-1" as -1.0."""
    try:
        if int(value) == float(value):
            return int(value)
    except (TypeError, ValueError):
        pass
    raise UserError(f"{name} = {value!r}: expected a whole number")
