"""Arguments that several scripts share; this module imports no JAX, whose settings a script may still change."""

from __future__ import annotations

import argparse
from pathlib import Path

from vr_jax.errors import UserError
from vr_jax.path_text import check_path_text, is_bucket


def path(text: str) -> Path:
    """A file or a folder, read as every command of vr-jax reads one (`~`, no empty text, no bucket)."""
    try:
        found = check_path_text(text, "path")
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if is_bucket(found):
        raise argparse.ArgumentTypeError(f"path = {found}: this script reads and writes folders of a disk only")
    return Path(found)
