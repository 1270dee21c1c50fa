"""The environment that chat templates are rendered in: Jinja's sandbox, with what transformers gives to templates.

Source: transformers: utils/chat_template_utils.py, `_cached_compile_jinja_template`. What differs: `strftime_now` does
not exist here, because a prompt that holds the day of its tokenisation could not be made again. Templates that ask for
the day only where the function exists write the day that they state themselves.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

# What rendering a template that does not suit the messages can raise, `raise_exception` of the template among them.
RENDER_ERRORS = (jinja2.TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError)


class _Generation(jinja2.ext.Extension):
    """Reads the tag `generation`, by which transformers finds replies, and writes what is in it."""

    tags = {"generation"}  # noqa: RUF012  # Jinja declares it as a variable of instances.

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Returns the statements between the tag and its end."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """A namespace that refuses names which could reach into Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # a template may use `self` as a name
        values = dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        """Sets a value by its name."""
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a chat template stores {name!r} in a namespace")


def _raise(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["namespace"] = _Namespace
    return environment.from_string(template)


def render(template: str, messages: Sequence[Mapping[str, Any]], values: Mapping[str, Any], *, prompt: bool) -> str:
    """Renders a chat template.

    Args:
        template: The text of the template.
        messages: The messages, as {"role", "content"}.
        values: What the template may read beside the messages, e.g. the special tokens.
        prompt: Whether the assistant's header follows.

    Raises:
        jinja2.TemplateError: The template is malformed, or refuses the messages. What else a template can raise stands
            in `RENDER_ERRORS`.
    """
    text: str = _compiled(template).render(
        messages=messages, tools=None, documents=None, add_generation_prompt=prompt, **values
    )
    return text
