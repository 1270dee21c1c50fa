"""The chat template of a foreign folder, the chat format that a model speaks, and the templates that export writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vr_jax.convert.decoder_configs import LLAMA_FAMILY, MISTRAL_FAMILY, DecoderFamily
from vr_jax.data.prompts.chat_templates import ChatTemplate
from vr_jax.data.prompts.jinja import RENDER_ERRORS, render
from vr_jax.data.prompts.templates import NAMED
from vr_jax.errors import UserError
from vr_jax.model.config import Template
from vr_jax.model_directory import is_there, load_tokenizer, read_json, token_ids
from vr_jax.storage import Path

# In the order of transformers: the first file that exists counts.
_FILES = ("chat_template.jinja", "chat_template.json", "processor_config.json", "tokenizer_config.json")
_TOKENIZER = "tokenizer.json"
_LLAMA_3_HEADER, _LLAMA_3_VOCABULARY = "<|start_header_id|>", 128_000
_CHATML_HEADER = "<|im_start|>"


def find_template(directory: Path) -> tuple[str, str] | None:
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


def named_template(family: DecoderFamily, directory: Path, vocab_size: int) -> Template:
    """Returns the chat format of LLaVA's code for a decoder.

    Args:
        family: The family of the decoder.
        directory: Its folder, whose tokenizer tells a Llama 3 from a Llama 2 or a Vicuna.
        vocab_size: The size of its vocabulary, which tells them apart where there is no tokenizer.

    Raises:
        UserError: The tokenizer cannot be read.
    """
    if family is MISTRAL_FAMILY:
        return "mistral_instruct"
    if family is not LLAMA_FAMILY:
        return "qwen_1_5"
    path = directory / _TOKENIZER
    third = _LLAMA_3_HEADER in token_ids(path) if path.exists() else vocab_size >= _LLAMA_3_VOCABULARY
    return "llama_3" if third else "vicuna_v1"


def tell_doubt(named: Template, directory: Path, report: Callable[[str], None]) -> None:
    """Reports that a model may speak another format than that of its decoder's family.

    LLaVA tells ChatML by the name of a checkpoint, as that of llava-v1.6-34b, whose decoder is a Llama.

    Args:
        named: The format of the family.
        directory: The folder of the tokenizer.
        report: Receives the line.

    Raises:
        UserError: The tokenizer cannot be read.
    """
    path = directory / _TOKENIZER
    if named in ("vicuna_v1", "llama_3", "mistral_instruct") and path.exists() and _CHATML_HEADER in token_ids(path):
        report(
            f"{path} has the token {_CHATML_HEADER!r} of ChatML, but the folder has no chat template, and the model is "
            f"asked in the format {named!r} of its decoder; if it was trained in ChatML, set 'template' in config.json "
            "of the result to 'qwen_1_5'"
        )


def unusable(template: str, directory: Path) -> str | None:
    """Returns why the chat template of a folder cannot be asked by, or None if it can.

    Args:
        template: The template.
        directory: The folder with the files of the tokenizer.
    """
    try:
        tokenizer = load_tokenizer(directory)
        tokenizer.chat_template = template
        ChatTemplate.of(tokenizer)
    except UserError as error:
        return str(error)
    return None


def writes_chatml(template: str) -> bool:
    """Returns whether a template writes the prompts of "qwen_1_5"."""
    return same_prompts(template, CHAT_TEMPLATES["qwen_1_5"])


def same_prompts(template: str, other: str) -> bool:
    """Returns whether two templates write the same prompts, as far as two short conversations tell.

    Args:
        template: The text of a template.
        other: The text of another one.
    """
    conversations = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "one"}]}],
        [
            {"role": "user", "content": [{"type": "text", "text": "one"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "two"}]},
            {"role": "user", "content": [{"type": "text", "text": "three"}]},
        ],
    ]
    try:
        return all(
            render(template, one, {}, prompt=True) == render(other, one, {}, prompt=True) for one in conversations
        )
    except RENDER_ERRORS:
        return False


# The images of a message stand before its text, as the questions of `vr-jax chat` have them.
_IMAGES_AND_TEXT = (
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% set images = message['content'] | selectattr('type', 'equalto', 'image') | list %}"
    "{% for image in images %}<image>{% if not loop.last %} {% endif %}{% endfor %}"
    "{% if images %}{{ '\\n' }}{% endif %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
)
_TRIMMED = "{% set content %}" + _IMAGES_AND_TEXT + "{% endset %}{{ content | trim }}"
_SYSTEM_FIRST = "{% if messages[0]['role'] != 'system' %}SYSTEM{% endif %}"
# What `vr-jax chat` asks, for each chat format that an export may have, as templates of transformers.
CHAT_TEMPLATES: dict[Template, str] = {
    "qwen_1_5": (
        _SYSTEM_FIRST.replace("SYSTEM", f"<|im_start|>system\n{NAMED['qwen_1_5'].system_message}<|im_end|>\n")
        + "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        + _IMAGES_AND_TEXT
        + "<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "vicuna_v1": (
        _SYSTEM_FIRST.replace("SYSTEM", NAMED["vicuna_v1"].system_message + " ")
        + "{% for message in messages %}{% if message['role'] == 'user' %}USER: "
        "{% elif message['role'] == 'assistant' %}ASSISTANT: {% endif %}"
        + _IMAGES_AND_TEXT
        + "{% if message['role'] == 'assistant' %}</s>{% else %} {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
    "llama_3": (
        "<|begin_of_text|>"
        + _SYSTEM_FIRST.replace(
            "SYSTEM",
            f"<|start_header_id|>system<|end_header_id|>\n\n{NAMED['llama_3'].system_message}<|eot_id|>",
        )
        + "{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
        + _TRIMMED
        + "<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "mistral_instruct": (
        "{% for message in messages %}{% if message['role'] == 'system' %}"
        "{% elif message['role'] == 'user' %}[INST] "
        "{% if loop.index0 == 1 and messages[0]['role'] == 'system' %}<<SYS>>\n"
        "{% if messages[0]['content'] is string %}{{ messages[0]['content'] }}"
        "{% else %}{{ messages[0]['content'][0]['text'] }}{% endif %}{{ '\\n<</SYS>>\\n\\n' }}{% endif %}"
        + _IMAGES_AND_TEXT
        + " [/INST]{% else %} "
        + _IMAGES_AND_TEXT
        + " </s>{% endif %}{% endfor %}"
    ),
    # Unlike LLaVA's, images have no white space around them, and stand where the message has them.
    "qwen2_vl": (
        _SYSTEM_FIRST.replace("SYSTEM", f"<|im_start|>system\n{NAMED['qwen2_vl'].system_message}<|im_end|>\n")
        + "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% if message['content'] is string %}{{ message['content'] }}"
        "{% else %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
        "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
        "<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}
