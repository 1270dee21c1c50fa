"""Logging of the commands: messages go to standard error, and libraries say only what a user can act on."""

from __future__ import annotations

import logging
import sys

# Orbax and Grain report every save and every worker through absl, and Orbax also the traceback of each error that it
# raises, which the command reports in one line; asyncio reports each array that a full disk did not take.
_QUIET = {"absl": logging.CRITICAL, "asyncio": logging.CRITICAL, "jax": logging.WARNING, "transformers": logging.ERROR}


def start_logging(program: str, *, verbose: bool) -> None:
    """Sends the messages of this process to standard error.

    Args:
        program: The words that name the command at the start of each line.
        verbose: Whether the package's messages of level INFO are shown, with their time.
    """
    layout = "%(asctime)s %(levelname).1s %(message)s" if verbose else f"{program}: %(message)s"
    logging.basicConfig(format=layout, datefmt="%H:%M:%S", force=True)
    for name, level in _QUIET.items():
        logging.getLogger(name).setLevel(level)
    logging.getLogger("vr_jax").setLevel(logging.INFO if verbose else logging.WARNING)
    sys.unraisablehook = _without_cancelled_writes


def _without_cancelled_writes(unraisable: sys.UnraisableHookArgs) -> None:
    """Hides what pending writes report after one write failed and Orbax closed its event loop."""
    if "Event loop is closed" not in str(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


def quiet() -> None:
    """Hides messages of level INFO, on all processes of a run but the first."""
    logging.getLogger("vr_jax").setLevel(logging.WARNING)
