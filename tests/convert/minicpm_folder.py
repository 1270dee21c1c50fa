"""Folders of tiny MiniCPM-V 2.0 models in the layout of its remote code, of recorded cases, for tests."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from PIL import Image
from safetensors.numpy import save_file
from tokenizers import models, normalizers, pre_tokenizers, processors

from tests.golden.discovery import Case, cases
from vr_jax.convert import minicpm_v
from vr_jax.data.types import IMAGE, Conversation, Turn
from vr_jax.model.encoders.siglip_slices import SiglipSlicesConfig

# An image and its slices in the text of a recorded case.
_PLACEHOLDER = re.compile(r"<image>\{\d+\}</image>(?:<slice>.*?</slice>)?\n", re.DOTALL)
_SPECIAL = {
    "<unk>": 0,
    "<s>": 1,
    "</s>": 2,
    "\n": 5,
    "<image>": 101,
    "</image>": 102,
    "<slice>": 111,
    "</slice>": 112,
    "<用户>": 114,
    "<AI>": 115,
}


def whole_cases() -> list:
    """Parameters of tests: the recorded questions to whole models."""
    return [one for one in cases("minicpm_v") if one.values[0] is None or one.values[0].kind == "whole"]


def describe_tower(case: Case, monkeypatch) -> None:
    """Makes the tiny vision tower and resampler of a case known by the name that the folder's config.json has."""
    vision = case.config["vision"]
    tower = SiglipSlicesConfig(
        hidden_size=vision["embed_dim"],
        intermediate_size=int(vision["embed_dim"] * vision["mlp_ratio"]),
        num_layers=vision["depth"],
        num_heads=vision["num_heads"],
        position_grid=vision["img_size"] // vision["patch_size"],
        patch_size=vision["patch_size"],
    )
    monkeypatch.setitem(minicpm_v.TOWERS, "vit_tiny", tower)
    monkeypatch.setattr(minicpm_v, "HEAD_CHANNELS", case.config["llm"]["hidden_size"] // case.config["resampler_heads"])


def config_json(case: Case) -> dict[str, Any]:
    """The config.json of a case, with the fields of the published one."""
    layout = json.loads((case.folder / "checkpoint_layout.json").read_text())
    changes = {"query_num": case.config["query_num"], "vision_encoder": "vit_tiny", "torch_dtype": "float32"}
    sizes = {name: case.config[name] for name in ("max_slice_nums", "scale_resolution")}
    return {**layout["config.json"], **case.config["llm"], **sizes, **changes}


def preprocessor_json(case: Case) -> dict[str, Any]:
    """The preprocessor_config.json of a case, with the fields of the published one."""
    layout = json.loads((case.folder / "checkpoint_layout.json").read_text())
    sizes = {name: case.config[name] for name in ("max_slice_nums", "scale_resolution")}
    return {**layout["preprocessor_config.json"], **sizes, "image_feature_size": case.config["query_num"]}


def write_folder(directory: Path, case: Case, **changes: Any) -> Path:
    """Writes the folder of a case; `changes` are fields of config.json, absent where they are None."""
    directory.mkdir(parents=True, exist_ok=True)
    values = {name: value for name, value in (config_json(case) | changes).items() if value is not None}
    (directory / "config.json").write_text(json.dumps(values))
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor_json(case)))
    (directory / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    save_file({name: np.ascontiguousarray(x) for name, x in case.weights.items()}, directory / "model.safetensors")
    tokenizer(case).save_pretrained(directory)
    return directory


def tokenizer(case: Case) -> Any:
    """The stub tokenizer of a recorded case: one id per character, as far as its text shows it.

    Characters that share an id are replaced by one of them, because a vocabulary has one text for each id.
    """
    from transformers import PreTrainedTokenizerFast

    text = re.sub(r"\{(\d+)\}", lambda found: "<unk>" * int(found[1]), case.config["text"])
    pieces = ["<s>", *re.findall("|".join(map(re.escape, _SPECIAL)) + "|.", text, re.DOTALL)]
    ids = case.inputs["input_ids"][0].tolist()
    texts = {number: name for name, number in _SPECIAL.items()} | dict(zip(ids, pieces, strict=True))
    replaced = {piece: texts[number] for piece, number in zip(pieces, ids, strict=True) if texts[number] != piece}
    vocabulary = {texts.get(number, f"<free {number}>"): number for number in range(case.config["llm"]["vocab_size"])}
    found = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    found.normalizer = normalizers.Sequence([normalizers.Replace(*pair) for pair in replaced.items()])
    found.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    found.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    found.add_special_tokens([name for name in _SPECIAL if name != "\n"])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=found, **names)


def conversation(case: Case) -> Conversation:
    """The recorded question, with its images as PNG files."""
    turns = []
    for speaker, message in re.findall(r"(<用户>|<AI>)(.*?)(?=<用户>|<AI>|$)", case.config["text"], re.DOTALL):
        if message:
            parts = [IMAGE if part is None else part for part in _split(message)]
            turns.append(Turn("user" if speaker == "<用户>" else "assistant", *parts))
    images = []
    for number in range(len(case.config["image_sizes_wh"])):
        file = io.BytesIO()
        Image.fromarray(case.inputs[f"image_{number}"]).save(file, "PNG")
        images.append(file.getvalue())
    return Conversation(case.name, tuple(turns), tuple(images))


def _split(message: str) -> list[str | None]:
    """The texts of a message, with None for each image."""
    texts = _PLACEHOLDER.split(message)
    return [part for text in texts for part in (None, text)][1:]
