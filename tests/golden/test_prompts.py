"""Prompts of Qwen2.5-VL and MiniCPM-V 2.0 against every recorded conversation (exact)."""

import re

import numpy as np
import pytest
from transformers import AddedToken, AutoTokenizer

from tests.golden.discovery import DATA_ROOT, Entry, documents, entries, needs_data
from vr_jax.data.conversations import IMAGE_TOKEN, ChatEncoder
from vr_jax.data.prompts.templates import NAMED
from vr_jax.data.types import IMAGE, ImagePart, Marker, Turn

PAD = "<|image_pad|>"
QWEN_ROWS = [row for row in entries("vr_qwen2_5_vl", "rows") if row.id == "absent" or "messages" in row.values[0].value]
# How MiniCPM's processor marks an image, and what it and the release put there.
TAG = "(<image>./</image>)"
LAYOUT = re.compile(r"<image>\{\d+\}</image>(<slice>.*?</slice>)?", re.DOTALL)


def minicpm_rows() -> list:
    rows = [row for _, document in documents("minicpm_v") for row in document.get("prompts", {}).get("rows", ())]
    return [pytest.param(row, id=str(k)) for k, row in enumerate(rows)] or entries("minicpm_v", "prompts")


def written(template: str, turns: list[Turn], image: str) -> str:
    segments = NAMED[template].write(turns, prompt=True)
    return "".join(image if isinstance(one.part, ImagePart) else one.part for one in segments)


def message(one: dict) -> Turn:
    content = one["content"]
    if isinstance(content, str):
        return Turn(one["role"], content)
    return Turn(one["role"], *(IMAGE if part["type"] == "image" else part["text"] for part in content))


@pytest.fixture(scope="module")
def qwen_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(DATA_ROOT / "qwen2_tokenizer")
    ids = next(one for _, one in documents("vr_qwen2_5_vl") if "special token ids" in one)["special token ids"]
    tokenizer.add_tokens([AddedToken(name, special=True) for name in ids], special_tokens=True)
    assert {name: tokenizer.convert_tokens_to_ids(name) for name in ids} == ids
    return tokenizer


@needs_data("qwen2_tokenizer")
@pytest.mark.parametrize("case", QWEN_ROWS)
def test_qwen2_5_vl(case: Entry, qwen_tokenizer):
    turns = [message(one) for one in case.value["messages"]]
    assert written("qwen2_vl", turns, f"<|vision_start|>{PAD}<|vision_end|>") == case.value["text"]

    encoder = ChatEncoder(qwen_tokenizer, "qwen2_vl", label_quirk=False, text_pool="first_turn")
    found = encoder.prompt(turns)
    pad = qwen_tokenizer.convert_tokens_to_ids(PAD)
    counts = iter([int(np.prod(grid)) // 4 for grid in case.value.get("image_grid_thw") or ()])
    ids = []
    for token in found.tokens.tolist():
        start, end = (encoder.markers[one] for one in (Marker.IMAGE_START, Marker.IMAGE_END))
        ids += [start, *[pad] * next(counts), end] if token == IMAGE_TOKEN else [token]
    assert ids == case.value["input_ids"]
    assert not found.loss_mask.any()


@pytest.mark.parametrize("row", minicpm_rows())
def test_minicpm_v(row: dict):
    turns = []
    for one in row["conversation"]:
        before, tag, behind = one["content"].partition(TAG)
        turns.append(Turn(one["role"], before, *([IMAGE] if tag else []), behind))
    if not any(turn.images for turn in turns):
        turns[0] = Turn("user", IMAGE, *turns[0].parts)
    # The mirror's last version appends <AI> twice, which the release does not.
    expected = row.get("release_chat_text") or row["processor_text"].removesuffix("<AI>")
    assert written("minicpm_v", turns, "IMAGE") == LAYOUT.sub("IMAGE", expected)
