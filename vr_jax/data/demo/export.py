"""Writing of the demo's data as files, in the two formats of real data, to look at or to read with the file sources."""

from __future__ import annotations

import json
import os
from typing import Any, Protocol

from vr_jax.data.demo.source import DemoSample, DemoSource
from vr_jax.data.types import Conversation
from vr_jax.storage import Path, as_path, complete_directory

_LLAVA_ROLES = {"user": "human", "assistant": "gpt", "system": "system"}


def write_llava(source: DemoSource, directory: str | os.PathLike[str]) -> Path:
    """Writes the records as a JSON file in LLaVA's format with PNG images.

    Args:
        source: The records.
        directory: The new folder. It will contain `data.json` and the image folder `images`, and appears when it is
            complete.

    Returns:
        The path of `data.json`.

    Raises:
        UserError: The folder contains files already, or cannot be written.
    """
    with complete_directory(directory) as work:
        (work / "images").mkdir()
        records: list[dict[str, Any]] = []
        for index in range(len(source)):
            sample = source.sample(index)
            (work / "images" / f"{sample.id}.png").write_bytes(sample.png)
            records.append(llava_record(sample.conversation(), f"{sample.id}.png"))
        (work / "data.json").write_text(json.dumps(records, indent=1) + "\n")
    return as_path(directory) / "data.json"


def llava_record(conversation: Conversation, image: str) -> dict[str, Any]:
    """Returns a conversation about one image as a record in LLaVA's format.

    Args:
        conversation: The conversation.
        image: The name of the image's file.
    """
    turns = [{"from": _LLAVA_ROLES[turn.role], "value": turn.text} for turn in conversation.turns]
    return {"id": conversation.id, "image": image, "conversations": turns}


class Samples(Protocol):
    """A source of generated images with questions."""

    @property
    def split(self) -> str:
        """The split, "train" or "held_out"."""

    def __len__(self) -> int:
        """The number of images."""

    def sample(self, index: int) -> DemoSample:
        """An image with its questions."""


def write_chartqa(source: Samples, directory: str | os.PathLike[str]) -> Path:
    """Writes the questions in the format of the ChartQA benchmark with PNG images.

    Each question is one line with the fields type (the kind of question), question, answer, imgname and image.

    Args:
        source: The records. The split "held_out" becomes `test.jsonl`, the split "train" becomes `train.jsonl`.
        directory: The new folder. It will contain the file and the image folder `images`, and appears when it is
            complete.

    Returns:
        The path of the JSONL file.

    Raises:
        UserError: The folder contains files already, or cannot be written.
    """
    name = "test.jsonl" if source.split == "held_out" else "train.jsonl"
    with complete_directory(directory) as work:
        (work / "images").mkdir()
        rows = []
        for index in range(len(source)):
            sample = source.sample(index)
            image = f"{sample.id}.png"
            (work / "images" / image).write_bytes(sample.png)
            rows += [
                {
                    "type": question.kind,
                    "question": question.text,
                    "answer": question.answer,
                    "imgname": image,
                    "image": f"images/{image}",
                }
                for question in sample.questions
            ]
        (work / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return as_path(directory) / name
