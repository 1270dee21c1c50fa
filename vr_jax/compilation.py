"""Compiled programs are kept on disk between runs, by JAX's persistent compilation cache (a leaf module)."""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path

import jax
from jax.typing import DTypeLike

from vr_jax.errors import UserError
from vr_jax.path_text import is_bucket
from vr_jax.sharding import platform
from vr_jax.storage import refuse_missing_client

OFF_VARIABLE = "VR_JAX_NO_CACHE"
MIN_SECONDS = 0.5  # programs that compile faster are not worth a file
MAX_BYTES = 10 * 2**30  # beyond, what was used longest ago is deleted

logger = logging.getLogger("vr_jax.compilation")


def use_compilation_cache() -> str | None:
    """Lets this process find programs that an earlier one compiled, and keep its own.

    The folder, which may lie in a bucket, is $JAX_COMPILATION_CACHE_DIR, else `vr_jax/compiled` in $XDG_CACHE_HOME or
    ~/.cache. $VR_JAX_NO_CACHE=1 or JAX's own $JAX_ENABLE_COMPILATION_CACHE=0 switches the cache off. Other variables of
    JAX's cache win over what is set here. A folder that cannot be written to is a line in the log, never an error. Call
    this before anything is compiled, and after `jax.distributed.initialize`.

    Several processes may share a folder. Of a run with several processes JAX writes from the first only. Entries are
    locked where the folder's size has a limit, and an entry that cannot be read is compiled again.

    Returns:
        The folder, or None where there is no cache.
    """
    if os.environ.get(OFF_VARIABLE, "") not in ("", "0") or not jax.config.jax_enable_compilation_cache:
        return None
    chosen = jax.config.jax_compilation_cache_dir  # JAX has read its variable, and would make a folder named ~
    chosen = chosen and os.path.expanduser(chosen)
    directory = chosen if chosen is not None else _own_directory()
    if not directory:
        return None
    if is_bucket(directory):
        try:
            refuse_missing_client(directory)
        except UserError as error:
            logger.warning("%s: programs are compiled anew in each run", error)
            jax.config.update("jax_enable_compilation_cache", False)
            return None
    jax.config.update("jax_compilation_cache_dir", directory)
    settings: dict[str, object] = {
        "jax_persistent_cache_min_compile_time_secs": MIN_SECONDS,
    }
    # A limit needs a lock: many hosts would wait for it, and a bucket has none.
    if not jax.distributed.is_initialized() and not is_bucket(directory):
        settings["jax_compilation_cache_max_size"] = MAX_BYTES
    for name, value in settings.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)
    return directory


def _own_directory() -> str | None:
    try:
        directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vr_jax" / "compiled"
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)  # whoever writes here runs code in the user's name
    except (OSError, RuntimeError) as error:  # RuntimeError: nobody knows where home is
        logger.warning("no folder for compiled programs (%s): they are compiled anew in each run", error)
        return None
    if not os.access(directory, os.W_OK):
        logger.warning("%s cannot be written to: programs are compiled anew in each run", directory)
        return None
    return str(directory)


# XLA's default on CPUs is YNNPACK for everything. On the machine we measured (AMD Zen 4; docs/results/speed.md) it
# multiplies large float32 matrices 20 % slower than Eigen, but reduces rows three times as fast.
_CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}


def compiler_options(dtype: DTypeLike) -> dict[str, str]:
    """Returns options for `jax.jit(..., compiler_options=...)` that were measured to be faster than XLA's own choice.

    Args:
        dtype: The type of the program's matrix products. bfloat16 is left alone on CPUs, because Eigen has no fast
            products of it.

    Returns:
        The options for the platform that `sharding.platform` names, empty where nothing was found to be faster.
    """
    if platform() != "cpu" or jax.numpy.dtype(dtype) != jax.numpy.float32:
        return {}
    return dict(_CPU_OPTIONS) if _known() else {}


@functools.cache
def _known() -> bool:
    """Returns whether this jaxlib has the options; they are experimental, and an unknown name is an error."""
    try:
        jax.jit(lambda x: x, compiler_options=_CPU_OPTIONS).lower(0.0).compile()
    except jax.errors.JaxRuntimeError as error:
        logger.info("options of the CPU compiler are left at their defaults: %s", error)
        return False
    return True
