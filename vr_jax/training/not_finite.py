"""Ends a run on a number that is NaN or infinite, and says what is known about its cause and about the way back."""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from vr_jax import distributed
from vr_jax.errors import EXIT_NOT_FINITE, UserError
from vr_jax.settings import TrainConfig
from vr_jax.sharding import replicated
from vr_jax.storage import Path, write_json
from vr_jax.training.optimizer import Params

NOT_FINITE_FILE = "non_finite_batch.json"
_REMEMBERED = 20  # steps whose losses are compared
_RISEN = 1.5  # a loss that is so many times the lowest of them is rising
_SHOWN_SAMPLES, _SHOWN_PARAMETERS = 20, 3


class NotFinite(UserError):
    """The loss, the gradient or a parameter is NaN or infinite; the message tells the step and the likely cause."""

    exit_code = EXIT_NOT_FINITE


@functools.cache
def _finite_check(mesh: Mesh) -> Callable[[Array], Array]:
    """A jitted function that tells whether all values of an array are finite; a process compiles each shape once."""
    return jax.jit(lambda array: jnp.isfinite(array).all(), out_shardings=replicated(mesh))


class FiniteWatch:
    """Looks at the numbers of every step, and at the parameters before they are saved or exported.

    All processes of a run make the same calls.
    """

    def __init__(
        self, config: TrainConfig, workdir: Path, mesh: Mesh, *, start: int, newest_checkpoint: Callable[[], int | None]
    ):
        """Starts with parameters that `parameters` has looked at, or that a checkpoint held.

        Args:
            config: The settings of the run.
            workdir: Folder of the run.
            mesh: The devices.
            start: Number of updates done before this start.
            newest_checkpoint: Returns the step of the newest complete checkpoint, or None if there is none.
        """
        self._config, self._workdir, self._start = config, workdir, start
        self._newest_checkpoint = newest_checkpoint
        self._losses: deque[tuple[int, float]] = deque(maxlen=_REMEMBERED)
        self._is_finite = _finite_check(mesh)

    def step(self, step: int, loss: float, grad_norm: float, record_ids: Sequence[str]) -> None:
        """Looks at the numbers of a step.

        Args:
            step: The number of the step.
            loss: Its loss.
            grad_norm: The norm of its gradient.
            record_ids: The samples of this process in its batch.

        Raises:
            NotFinite: One of the numbers is not finite.
        """
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self._losses.append((step, loss))
            return
        samples = [name for part in distributed.gather(list(record_ids)) for name in part]
        place = f"all in {self._workdir / NOT_FINITE_FILE}"
        if distributed.is_first():
            found = {"step": step, "loss": str(loss), "grad_norm": str(grad_norm), "record_ids": samples}
            try:
                write_json(self._workdir / NOT_FINITE_FILE, found)
            except UserError as error:  # what ends the run is the number, not this file
                place = str(error)
        shown = ", ".join(samples[:_SHOWN_SAMPLES])
        more = f" and {len(samples) - _SHOWN_SAMPLES} more" if len(samples) > _SHOWN_SAMPLES else ""
        raise NotFinite(
            f"step {step}: loss {loss}, gradient norm {grad_norm}; nothing of this step is saved or exported. "
            f"{self._suspects(step)} {self._way_back()} Samples of the batch ({place}): {shown}{more}"
        )

    def parameters(self, step: int, params: Params, where: str) -> None:
        """Looks at all parameters.

        Args:
            step: Number of updates done.
            params: Parameters by path.
            where: What happens to them next, for the message, e.g. "saved".

        Raises:
            NotFinite: One of them has a value that is not finite.
        """
        finite: dict[str, Array] = {path: self._is_finite(array) for path, array in params.items()}
        broken = [path for path, good in jax.device_get(finite).items() if not good]
        if not broken:
            return
        more = f" and {len(broken) - _SHOWN_PARAMETERS} more" if len(broken) > _SHOWN_PARAMETERS else ""
        names = ", ".join(broken[:_SHOWN_PARAMETERS])
        if step == 0:
            cause = f"They come from config.init_from = {self._config.init_from!r}: no update has been made."
        elif self._losses and self._losses[-1][0] == step:
            cause = (
                f"The loss {self._losses[-1][1]:g} and the gradient of step {step} are finite, so the settings are the "
                f"cause, not the samples: {self._settings()}."
            )
        else:
            raise NotFinite(f"checkpoint {step}: the parameters {names}{more} are not finite; nothing is {where}")
        raise NotFinite(
            f"step {step}: the parameters {names}{more} are not finite; nothing is {where}. {cause} {self._way_back()}"
        )

    def _suspects(self, step: int) -> str:
        """What the steps before tell about the cause."""
        if step == self._start + 1:
            since = "no update has been made" if step == 1 else f"the parameters of step {step - 1} were finite"
            return (
                f"It is the first step of this start and {since}, so the learning rate is not the cause: suspect the "
                f"samples, the weights that the run started from, and config.model.dtype = "
                f"{self._config.model.dtype!r}."
            )
        (low_step, low), (last_step, last) = min(self._losses, key=lambda one: one[1]), self._losses[-1]
        if last > _RISEN * low:
            return (
                f"The loss had risen from {low:.4g} in step {low_step} to {last:.4g} in step {last_step}, so suspect "
                f"the settings first: {self._settings()}."
            )
        if len(self._losses) == 1:
            return (
                f"Step {last_step} had loss {last:.4g}: suspect its update ({self._settings()}) as much as the samples."
            )
        return (
            f"The loss had not risen (steps {self._losses[0][0]}..{last_step}: {last:.4g} at the end), so suspect the "
            f"samples first, then the settings: {self._settings()}."
        )

    def _settings(self) -> str:
        optimizer = self._config.optimizer
        groups = f", lr_groups {optimizer.lr_groups}" if optimizer.lr_groups else ""
        return (
            f"config.optimizer with lr {optimizer.lr:g}{groups}, b1 {optimizer.b1:g}, b2 {optimizer.b2:g}, eps "
            f"{optimizer.eps:g}, weight_decay {optimizer.weight_decay:g}, clip_norm {optimizer.clip_norm:g}"
        )

    def _way_back(self) -> str:
        """Says whether there is a checkpoint to continue from."""
        try:
            newest = self._newest_checkpoint()
        except UserError as error:  # what ends the run is the number, not the last save
            return f"The checkpoints cannot be read: {error}."
        if newest is None:
            return "There is no checkpoint: start again when the cause is found."
        return f"The same command continues from the checkpoint of step {newest}, whose parameters are finite."
