"""How Orbax writes arrays to files (a leaf module)."""

from __future__ import annotations

import functools
import logging

import jax
import orbax.checkpoint as ocp

# Bytes of the smallest part of an array that a device writes by itself.
_SMALLEST_PART = 1 << 20


@functools.cache
def write_small_arrays_whole() -> None:
    """Sets for this process that one device writes a small array, even where several devices hold a copy of it.

    By default Orbax cuts every array of which there are several copies, so that each device writes a part. Each cut is
    a program of its own, which is compiled at the first save and holds up the training at every save; for a norm's
    scale it saves nothing.
    """
    handler = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_SMALLEST_PART)
    log = logging.getLogger("absl")
    before, log.disabled = log.disabled, True  # Orbax warns of every handler that takes the place of another.
    try:
        ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)
    finally:
        log.disabled = before
