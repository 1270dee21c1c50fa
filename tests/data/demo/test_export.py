"""The demo's data as files in the formats of LLaVA and ChartQA."""

import json

import pytest

from vr_jax.data.demo.export import write_chartqa, write_llava
from vr_jax.data.demo.source import DemoSource
from vr_jax.errors import UserError


def test_llava_files(tmp_path):
    source = DemoSource("train", 5, turns=2)
    path = write_llava(source, tmp_path / "set")
    records = json.loads(path.read_text())
    assert len(records) == 5
    for record, conversation in zip(records, (source[i] for i in range(5)), strict=True):
        assert set(record) == {"id", "image", "conversations"}
        assert [turn["from"] for turn in record["conversations"]] == ["human", "gpt"] * 2
        assert [turn["value"] for turn in record["conversations"]] == [turn.text for turn in conversation.turns]
        assert (tmp_path / "set" / "images" / record["image"]).read_bytes() == conversation.images[0]
    with pytest.raises(UserError, match="set exists; choose another folder"):
        write_llava(source, tmp_path / "set")


def test_chartqa_files(tmp_path):
    source = DemoSource("held_out", 6)
    path = write_chartqa(source, tmp_path / "set")
    assert path.name == "test.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    samples = [source.sample(i) for i in range(6)]
    assert [(r["type"], r["question"], r["answer"]) for r in rows] == [
        (q.kind, q.text, q.answer) for sample in samples for q in sample.questions
    ]
    for row, sample in zip(rows, samples, strict=True):
        assert row["image"] == f"images/{row['imgname']}"
        assert (path.parent / row["image"]).read_bytes() == sample.png


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(DemoSource, "sample", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_chartqa(DemoSource("train", 2), tmp_path / "set")
    assert list(tmp_path.iterdir()) == []
