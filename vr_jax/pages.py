"""The environment of the templates of all HTML pages (a leaf module)."""

from __future__ import annotations

import re
from typing import Any

import jinja2
from markupsafe import Markup

_UNSHOWABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


def page_environment(package: str) -> jinja2.Environment:
    """Returns an environment for the templates in the folder `templates` of a package.

    Every value is escaped, and a name that a template does not know is an error.

    Args:
        package: The name of the package, e.g. "vr_jax.evaluation.report".
    """
    return jinja2.Environment(
        loader=jinja2.PackageLoader(package),
        autoescape=True,
        finalize=showable,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def showable(value: Any) -> Any:
    """Replaces the characters of a text that an HTML page in UTF-8 cannot hold.

    Control characters are shown by their symbols. Halves of surrogate pairs and non-characters become U+FFFD. The
    template engine calls this function on every value before it escapes the value.

    Args:
        value: A value of a template. Markup is returned as it is.
    """
    if isinstance(value, Markup):
        return value
    return _UNSHOWABLE.sub(_symbol, str(value).replace("\r\n", "\n"))


def _symbol(match: re.Match[str]) -> str:
    code = ord(match.group())
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else "\ufffd"
