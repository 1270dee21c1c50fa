"""The one class of foreseen errors, and the exit codes of the commands (a leaf module)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

EXIT_DONE = 0
EXIT_FAULT = 1  # a fault of the program, with a traceback; Python's own choice
EXIT_USER_ERROR = 2
EXIT_NOT_FINITE = 3
EXIT_TOO_MANY_SKIPS = 4
EXIT_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: the same command, started again, continues
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
EXIT_OUTPUT_CLOSED = 141  # 128 + SIGPIPE, as shells report it


class UserError(Exception):
    """An error that the user can mend; its message is one line, or one line and a list.

    The message names the file, tensor, record or field, what was found, what was expected and what to do. A command
    catches this class and nothing else: it prints the message to standard error and exits with `exit_code`. A subclass
    exists only where a caller tells it apart from other errors, or where the exit code differs; it can be built from
    the message alone, so that every process of a run can raise the error that one of them had.

    Attributes:
        exit_code: The exit status of a command that ends with this error.
    """

    exit_code: ClassVar[int] = EXIT_USER_ERROR


class ConfigError(UserError):
    """A configuration that cannot be built; the message names the field, its value and the values it may have."""


class ProcessLost(UserError):
    """Another process of the run is lost, or has never started; nothing is wrong with the command."""

    exit_code = EXIT_AGAIN


def user_error_class(name: str) -> type[UserError]:
    """Returns the subclass of `UserError` with this qualified name, or `UserError` itself if there is none."""
    found = [UserError]
    for one in found:
        if one.__qualname__ == name:
            return one
        found.extend(one.__subclasses__())
    return UserError


def message_list(title: str, lines: Sequence[str], limit: int = 20) -> str:
    """Returns a title line, and below it the first lines of a list and the number of the others."""
    more = [f"... and {len(lines) - limit} more"] if len(lines) > limit else []
    return "\n".join([title, *(f"  {line}" for line in [*lines[:limit], *more])])
