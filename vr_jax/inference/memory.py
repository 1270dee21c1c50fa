"""Reports devices that run out of memory as an error that the user can mend."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax

from vr_jax.errors import UserError


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Turns the error of a full device into a `UserError` that says what to change.

    Raises:
        UserError: The memory of the devices does not suffice.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the devices' memory does not suffice; try a smaller batch_size, dtype bfloat16 or more devices ({reason})"
        ) from error
