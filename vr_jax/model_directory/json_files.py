"""Reading a JSON object from a file, whatever the file holds."""

from __future__ import annotations

import json
from typing import Any

from etils import epath

from vr_jax.errors import UserError


def read_json(path: epath.Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        UserError: The file is missing or unreadable, or holds something else.
    """
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except RecursionError:
        raise UserError(f"{path} is not valid JSON for us: it is nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}, expected an object")
    return values
