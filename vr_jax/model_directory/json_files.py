"""Reading a JSON object from a file, whatever the file holds."""

from __future__ import annotations

import os
from typing import Any

from vr_jax.errors import UserError
from vr_jax.storage import Path, parse_json


def is_there(path: Path) -> bool:
    """Returns whether a folder has a file of this name, which may be a link to a file that is missing.

    A cache of the hub has such links where the files that they mean were removed.
    """
    return path.exists() or path.is_symlink()


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        UserError: The file is missing or unreadable, or holds something else.
    """
    try:
        values = parse_json(path.read_bytes())
    except FileNotFoundError:
        if path.is_symlink():
            raise UserError(f"{path} is a link to {os.readlink(path)}, which is missing; download it again") from None
        raise UserError(f"{path} is missing") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}, expected an object")
    return values
