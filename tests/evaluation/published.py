"""Two rows of every benchmark in the layouts that its data have: the published parquet files and JSONL."""

from __future__ import annotations

import json
import math

import pyarrow as pa
import pyarrow.parquet as pq

from tests.inference.tiny import png
from vr_jax.evaluation.benchmarks import get_benchmark

# Two rows each, with all columns that the published files have and the benchmark reads, and one more.
ROWS = {
    "gqa": [
        {"id": "1", "imageId": "n1", "question": "Is it red?", "answer": "no", "types": {"structural": "verify"}},
        {"id": "2", "imageId": "n1", "question": "What is it?", "answer": "car", "types": {"structural": "query"}},
    ],
    "mme": [
        {
            "question_id": "x/1.png",
            "question": f"Is it {what}? Please answer yes or no.",
            "answer": answer,
            "category": "OCR",
        }
        for what, answer in [("a", "Yes"), ("b", "No")]
    ],
    "realworldqa": [
        {"question": "Which?\n\nA. x\nB. y", "answer": "B", "image_path": "p"},
        {"question": "How many?", "answer": "2", "image_path": "q"},
    ],
    "scienceqa": [
        {"question": "q", "choices": ["x", "y"], "answer": 1, "hint": "h", "subject": "natural science", "skill": "s"},
        {
            "question": "r",
            "choices": ["x", "y", "z"],
            "answer": 0,
            "hint": "",
            "subject": "social science",
            "skill": "s",
        },
    ],
    "ai2d": [{"question": f"q{i}", "options": list("wxyz"), "answer": str(i)} for i in range(2)],
    "mmmu": [
        {
            "id": "validation_Art_Theory_1",
            "question": "Which of <image 2> or <image 1>?",
            "options": "['<image 2>', \"it's\"]",
            "question_type": "multiple-choice",
            "answer": "B",
        },
        {
            "id": "validation_Math_2",
            "question": "Find x in <image 1>",
            "options": "[]",
            "question_type": "open",
            "answer": "3",
        },
    ],
    "mmstar": [
        {
            "index": i,
            "question": f"q{i}\nOptions: A: x, B: y",
            "answer": "B",
            "category": "math",
            "l2_category": f"c{i}",
        }
        for i in range(2)
    ],
    "chartqa": [
        {"type": "human_test", "question": "q", "answer": "1"},
        {"type": "augmented_test", "question": "r", "answer": "2"},
    ],
    "docvqa": [
        {"questionId": "1", "question": "q", "answers": ["a", "b"], "question_types": ["layout", "form"]},
        {"questionId": "2", "question": "r", "answers": ["c"], "question_types": ["table/list"]},
    ],
    "textvqa": [{"question_id": i, "question": "what NASA?", "answers": ["a"] * 10} for i in range(2)],
    "ocrbench": [
        {"dataset": "IIIT5K", "question": "q", "question_type": "Regular Text Recognition", "answer": ["a"]},
        {"dataset": "HME100k", "question": "r", "question_type": "Formulas", "answer": ["b", "c"]},
    ],
}
CATEGORIES = {
    "gqa": ["verify", "query"],
    "mme": ["OCR", "OCR"],
    "realworldqa": ["letter", "open"],
    "scienceqa": ["natural science", "social science"],
    "ai2d": ["all", "all"],
    "mmmu": ["Art_Theory", "Math"],
    "mmstar": ["math", "math"],
    "chartqa": ["human", "augmented"],
    "docvqa": ["layout", "table/list"],
    "textvqa": ["all", "all"],
    "ocrbench": ["Regular Text Recognition", "Formulas"],
}
FOLDERS = {"gqa": "testdev_balanced_instructions", "scienceqa": "ScienceQA-IMG", "docvqa": "DocVQA"}
IMAGES = "testdev_balanced_images"


def images(name, i):
    """The columns of row i with its images' contents."""
    if name == "mmmu":
        return {f"image_{k}": png(8, 8, 10 * i + k) if k <= 2 - i else None for k in range(1, 8)}
    return {"image": png(8, 8, 0 if name == "gqa" else i)}


def cell(content):
    return None if content is None else {"bytes": content, "path": "a.png"}


def table(rows):
    return pa.Table.from_pylist(rows)


def write(folder, split, rows, shards=1):
    folder.mkdir(parents=True, exist_ok=True)
    size = math.ceil(len(rows) / shards)
    for k in range(shards):
        path = folder / f"{split}-{k:05d}-of-{shards:05d}.parquet"
        pq.write_table(table(rows[k * size : (k + 1) * size]), path)
    return folder


def publish(name, folder, rows=None):
    """The layout on the hub; `rows` without images."""
    rows = ROWS[name] if rows is None else rows
    split = get_benchmark(name).published.split
    if name == "gqa":
        write(folder / IMAGES, split, [{"id": "n1", "image": cell(png(8, 8, 0))}])
        write(folder / FOLDERS[name], split, rows)
    else:
        full = [row | {k: cell(v) for k, v in images(name, i).items()} for i, row in enumerate(rows)]
        write(folder / FOLDERS.get(name, "data"), split, full, shards=len(rows))
    if name == "mmstar":
        first, second = sorted(folder.rglob("*.parquet"))
        whole = pa.concat_tables([pq.read_table(first), pq.read_table(second)])
        pq.write_table(whole, folder / "mmstar.parquet")
        first.unlink()
        second.unlink()
    return folder


def write_jsonl(name, folder, rows=None):
    (folder / "images").mkdir(parents=True)
    lines = []
    for i, row in enumerate(ROWS[name] if rows is None else rows):
        names = {}
        for column, content in images(name, i).items():
            if content is not None:
                names[column] = f"images/{i}_{column}.png"
                (folder / names[column]).write_bytes(content)
        lines.append(json.dumps(row | names))
    split = get_benchmark(name).published.split
    (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder
