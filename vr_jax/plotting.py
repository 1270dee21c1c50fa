"""Draws figures with matplotlib into files, without a screen; the same numbers give the same file (a leaf module).

matplotlib comes with an extra and may be absent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from vr_jax.errors import UserError
from vr_jax.storage import Path, atomic_write

SUFFIXES = (".svg", ".png", ".pdf")
_NO_DATE = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": {}}


class MatplotlibMissingError(UserError):
    """A figure cannot be drawn because matplotlib, which an extra brings, is not installed."""


def check_plotting() -> None:
    """Checks that figures can be drawn, before the hours of work that end with one.

    Raises:
        MatplotlibMissingError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MatplotlibMissingError(
            "matplotlib is not installed; pip install 'vr-jax[benchmarks]' brings it"
        ) from None


def check_path(path: Path) -> None:
    """Checks the name of a figure's file.

    Raises:
        UserError: Files with that ending cannot be written.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: expected a file name that ends in {', '.join(SUFFIXES)}")


@contextmanager
def figure_file(path: Path, size: tuple[float, float], rc: Mapping[str, Any] | None = None) -> Iterator[Any]:
    """Gives the block a figure to draw into. The file is written when the block ends, whole or not at all.

    Args:
        path: The file; its ending says which kind it is.
        size: Width and height in inches.
        rc: Settings of matplotlib beside those that make files repeatable.

    Yields:
        A `matplotlib.figure.Figure`.

    Raises:
        UserError: Files with that ending cannot be written, or matplotlib is not installed (`MatplotlibMissingError`).
        OSError: The file cannot be written.
    """
    check_path(path)
    check_plotting()
    import matplotlib

    settings: Any = {"backend": "Agg", "svg.hashsalt": "vr_jax", **(rc or {})}
    with matplotlib.rc_context(settings):
        from matplotlib.figure import Figure

        figure = Figure(figsize=size, layout="constrained")
        yield figure
        with atomic_write(path) as temporary:
            figure.savefig(temporary, dpi=160, metadata=_NO_DATE[path.suffix])
