"""Writes a demo set as files, in the two formats that real data comes in, to look at or to feed to the file readers."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vr_jax.data.demo.source import DemoSource

_LLAVA_ROLES = {"user": "human", "assistant": "gpt", "system": "system"}


def write_llava(source: DemoSource, directory: str | os.PathLike) -> Path:
    """`directory/data.json` in LLaVA's format ({"id", "image", "conversations"}) with images in `directory/images/`.

    Returns the path of data.json; the image folder of its records is `directory/images`. The directory appears
    when complete; raises FileExistsError if it is there already.
    """
    with _appearing_when_complete(Path(directory)) as work:
        records: list[dict[str, Any]] = []
        for index in range(len(source)):
            sample = source.sample(index)
            (work / "images" / f"{sample.id}.png").write_bytes(sample.png)
            turns = [{"from": _LLAVA_ROLES[t.role], "value": t.text} for t in sample.conversation().turns]
            records.append({"id": sample.id, "image": f"{sample.id}.png", "conversations": turns})
        (work / "data.json").write_text(json.dumps(records, indent=1) + "\n")
    return Path(directory) / "data.json"


def write_chartqa(source: DemoSource, directory: str | os.PathLike) -> Path:
    """`directory/<split>.jsonl` with one ChartQA row per question ({"type", "question", "answer", "imgname",
    "image"}; the type is the kind of question) and images in `directory/images/`. `held_out` becomes `test`.

    Returns the path of the jsonl file. The directory appears when complete; raises FileExistsError if it is there
    already.
    """
    name = "test.jsonl" if source.split == "held_out" else "train.jsonl"
    with _appearing_when_complete(Path(directory)) as work:
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
    return Path(directory) / name


@contextmanager
def _appearing_when_complete(directory: Path) -> Iterator[Path]:
    """A work directory with an `images` folder, renamed to `directory` at the end and removed on any error."""
    if directory.exists():
        raise FileExistsError(f"{directory} exists already; give a new directory, or remove it first")
    directory.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        (work / "images").mkdir()
        work.chmod(0o755)
        yield work
        work.rename(directory)
    finally:
        shutil.rmtree(work, ignore_errors=True)
