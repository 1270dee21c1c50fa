"""Writes the files beside the weights of an exported LLaVA that AutoProcessor and `generate` of transformers read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vr_jax.convert.chat_template import CHAT_TEMPLATES
from vr_jax.convert.configs import NEXT, ONEVISION, LlavaClass, class_of
from vr_jax.convert.encoder_configs import encoder_family
from vr_jax.convert.folder import IMAGE_PROCESSOR_FILE, PROCESSOR_FILE
from vr_jax.convert.preprocessing import LLAVA_CLASS, NEXT_CLASS, ONEVISION_CLASS, write_image_processor
from vr_jax.data.prompts.templates import NAMED
from vr_jax.errors import UserError
from vr_jax.model.config import VlmConfig
from vr_jax.model_directory import GENERATION_FILE, read_json, token_ids
from vr_jax.storage import Path, write_json, write_text

IMAGE_TOKEN, VIDEO_TOKEN = "<image>", "<video>"
_TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_FILE, _TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
_MESSAGE_END, _TEXT_END = "<|im_end|>", "<|endoftext|>"
_FLAGS = {**dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False), "special": True}


def complete_export(directory: Path, config: VlmConfig, report: Callable[[str], None]) -> int | None:
    """Adds the processor's files, the chat template and the image token to an export.

    Args:
        directory: The folder, which holds the files of the tokenizer already, if there is one.
        config: The model.
        report: Receives lines about what is missing.

    Returns:
        The id of the image token, or None without a tokenizer.

    Raises:
        UserError: The tokenizer cannot be read, or the vocabulary has no room for the image token.
    """
    kind = class_of(config)
    assert kind is not None
    image_processor = {ONEVISION.name: ONEVISION_CLASS, NEXT.name: NEXT_CLASS}.get(kind.name, LLAVA_CLASS)
    name = f"{kind.name}Processor"
    write_json(directory / IMAGE_PROCESSOR_FILE, write_image_processor(config.image, image_processor, name))
    write_json(directory / PROCESSOR_FILE, {"processor_class": name, **_processor(config, kind)})
    if not (directory / TOKENIZER_FILE).exists():
        report(f"there is no {TOKENIZER_FILE} to export, so that AutoProcessor of transformers cannot be used")
        return None
    write_template(directory, config, report)
    token = _add_tokens(directory, config)
    write_generation(directory, config, report)
    return token


def write_template(directory: Path, config: VlmConfig, report: Callable[[str], None]) -> None:
    """Writes the chat template that the model is asked by, unless the folder has one of transformers.

    Args:
        directory: The folder of an export, which holds the files of the tokenizer already.
        config: The model.
        report: Receives a line where no template is known.
    """
    # Only a model that came from transformers has a template for prompts with images.
    if config.template != "tokenizer" and (config.image_token_id is None or not _has_template(directory)):
        for name in ("chat_template.json", _TEMPLATE_FILE):
            (directory / name).unlink(missing_ok=True)
        if config.template in CHAT_TEMPLATES:
            write_text(directory / _TEMPLATE_FILE, CHAT_TEMPLATES[config.template])
        else:
            report(f"there is no chat template of transformers for the template {config.template!r}; add one")


def portable_tokenizer(directory: Path) -> None:
    """Makes the files of a tokenizer readable by transformers 4 too, where transformers 5 wrote them."""
    path = directory / _TOKENIZER_CONFIG
    if not path.exists():
        return
    values = read_json(path)
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    if values.get("tokenizer_class") == "PreTrainedTokenizerFast":
        # The base class of transformers 4 would add types of tokens, which no LLaVA takes.
        values.setdefault("model_input_names", ["input_ids", "attention_mask"])
    extra = values.get("extra_special_tokens")
    if isinstance(extra, list):
        values["additional_special_tokens"] = [*values.get("additional_special_tokens", []), *extra]
        del values["extra_special_tokens"]
    write_json(path, values)


def _processor(config: VlmConfig, kind: LlavaClass) -> dict[str, Any]:
    """The fields by which a processor counts the vision tokens of an image."""
    family = encoder_family(config.encoder)
    common = {"image_token": IMAGE_TOKEN, "vision_feature_select_strategy": family.select}
    if kind is ONEVISION:
        return {
            **common,
            "video_token": VIDEO_TOKEN,
            "num_image_tokens": config.cells_per_tile,
            "vision_aspect_ratio": f"anyres_max_{config.image.max_tiles}",
        }
    return {
        **common,
        "patch_size": config.encoder.patch_size,
        "num_additional_image_tokens": family.extra_tokens,
    }


def _has_template(directory: Path) -> bool:
    names = ("chat_template.json", _TEMPLATE_FILE)
    config = directory / _TOKENIZER_CONFIG
    inside = config.exists() and read_json(config).get("chat_template") is not None
    return inside or any((directory / name).exists() for name in names)


def _add_tokens(directory: Path, config: VlmConfig) -> int:
    """Adds the tokens of images and videos to the tokenizer where it lacks them; returns the id of that of images."""
    path = directory / TOKENIZER_FILE
    values = read_json(path)
    ids = token_ids(path)
    added = []
    for name in (IMAGE_TOKEN, VIDEO_TOKEN):
        number = max(ids.values(), default=-1) + 1
        if name not in ids and number < config.decoder.vocab_size:
            ids[name] = number
            added.append({"id": number, "content": name, **_FLAGS})
    if IMAGE_TOKEN not in ids:
        raise UserError(
            f"{path} has as many tokens as the decoder's vocabulary, {config.decoder.vocab_size}, and no "
            f"{IMAGE_TOKEN!r}: transformers needs a token for images; use --layout llava"
        )
    if added:
        write_json(path, {**values, "added_tokens": [*(values.get("added_tokens") or []), *added]})
        settings = directory / _TOKENIZER_CONFIG
        known = read_json(settings) if settings.exists() else {}
        if isinstance(known.get("added_tokens_decoder"), dict):
            known["added_tokens_decoder"] |= {str(one["id"]): {"content": one["content"], **_FLAGS} for one in added}
            write_json(settings, known)
    return ids[IMAGE_TOKEN]


def write_generation(directory: Path, config: VlmConfig, report: Callable[[str], None]) -> None:
    """Says which tokens end a reply, where generation_config.json does not.

    Args:
        directory: The folder of an export, which holds the files of the tokenizer already.
        config: The model.
        report: Receives a line where transformers would reply otherwise.
    """
    path = directory / GENERATION_FILE
    values: Mapping[str, Any] = read_json(path) if path.exists() else {}
    ids = token_ids(directory / TOKENIZER_FILE)
    names = NAMED[config.template].end_tokens if config.template in NAMED else (_MESSAGE_END, _TEXT_END)
    ends = [ids[name] for name in names if name in ids]
    if values.get("eos_token_id") is None and ends:
        values = {**values, "eos_token_id": ends, "pad_token_id": ends[-1]}
    if values:
        write_json(path, dict(values))
    if config.image_token_id is None and values.get("repetition_penalty") not in (None, 1.0):
        report(
            f"{GENERATION_FILE}: repetition_penalty = {values['repetition_penalty']} acts on the reply here, and in "
            "transformers on the tokens of the prompt too"
        )
