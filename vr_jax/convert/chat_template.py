"""The chat template of a foreign folder, compared with the prompts that the commands ask by.

Without another `VlmConfig.template`, the commands ask in ChatML with a default system message, which LLaVA trains with.
A template that writes other prompts is kept for an export, and a line of the import says that it is not asked by.
"""

from __future__ import annotations

from typing import Any

from etils import epath

from vr_jax.convert.processor_export import CHAT_TEMPLATE
from vr_jax.data.prompts.jinja import RENDER_ERRORS, render
from vr_jax.errors import UserError
from vr_jax.model_directory import is_there, read_json

# In the order of transformers: the first file that exists counts.
_FILES = ("chat_template.jinja", "chat_template.json", "processor_config.json", "tokenizer_config.json")


def find_template(directory: epath.Path) -> tuple[str, str] | None:
    """Returns the chat template that transformers takes, and the path of its file; None where there is none.

    Raises:
        UserError: A file cannot be read.
    """
    for name in _FILES:
        path = directory / name
        if not is_there(path):
            continue
        if name.endswith(".jinja"):
            try:
                template: Any = path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path} is not UTF-8 ({error.reason}); save it as UTF-8") from None
        else:
            template = read_json(path).get("chat_template")
        if isinstance(template, list):  # several templates by name, of which transformers takes the default one
            named = [one for one in template if isinstance(one, dict) and one.get("name") == "default"]
            template = named[0].get("template") if named else None
        if isinstance(template, str) and template.strip():
            return template, str(path)
    return None


def writes_chatml(template: str) -> bool:
    """Returns whether a template writes the prompts that the commands ask by."""
    conversations = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "one"}]}],
        [
            {"role": "user", "content": [{"type": "text", "text": "one"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "two"}]},
            {"role": "user", "content": [{"type": "text", "text": "three"}]},
        ],
    ]
    try:
        return all(_rendered(template, one) == _rendered(CHAT_TEMPLATE, one) for one in conversations)
    except RENDER_ERRORS:
        return False


def _rendered(template: str, messages: list[dict[str, Any]]) -> str:
    """The prompt that a template writes, as transformers renders it."""
    return render(template, messages, {}, prompt=True)
