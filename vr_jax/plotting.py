"""Matplotlib as this package uses it: an extra that may be absent, no screen, the same file for the same numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vr_jax.errors import UserError
from vr_jax.storage import atomic_write

SUFFIXES = (".svg", ".png", ".pdf")
_NO_DATE = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": {}}


class PlotError(UserError):
    """A figure that cannot be drawn; one line for the user."""


class NoMatplotlib(PlotError):
    """The figure needs an extra that is not installed."""


def check_plotting() -> None:
    """Raises NoMatplotlib if a figure could not be drawn, before hours of work whose end it is."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise NoMatplotlib("matplotlib is not installed; pip install 'vr-jax[benchmarks]' brings it") from None


def check_path(path: Path) -> None:
    """Raises PlotError for a kind of file that is not written."""
    if path.suffix not in SUFFIXES:
        raise PlotError(f"{path}: expected a file name that ends in {', '.join(SUFFIXES)}")


@contextmanager
def figure_file(path: Path, size: tuple[float, float], rc: Mapping[str, Any] | None = None) -> Iterator[Any]:
    """A figure of `size` inches to draw into; the file is written at the end, whole or not at all.

    rc: matplotlib's settings, beside those that make files repeatable. Raises NoMatplotlib, PlotError for an unknown
    kind of file, OSError."""
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
