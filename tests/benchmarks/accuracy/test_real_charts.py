"""The whole path on real files, with two updates in each phase."""

import json

import pytest

from benchmarks.accuracy import peft_parity, real_charts
from tests.golden.discovery import DATA_ROOT, needs_data

PARTS = ("memorised", "test")


@pytest.mark.slow
@pytest.mark.parametrize("family", real_charts.FAMILIES)
@needs_data("chartqa", "train.jsonl")
@needs_data("natural", "captions_llava.json")
@needs_data("qwen2_tokenizer", "vocab.json")
def test_all_runs_and_the_evaluations(family, plain_children, tmp_path):
    """It is slow because trainings and two evaluations compile models with Qwen2's vocabulary."""
    page, workdir = tmp_path / "page.md", tmp_path / "work"
    few = [f"--family={family}", "--items=2", "--steps=2", "--caption_steps=2", "--limit=2"]
    assert real_charts.main([f"--data={DATA_ROOT}", f"--workdir={workdir}", f"--results={page}", *few]) == 0
    summaries = {name: json.loads((workdir / f"eval_{name}/chartqa/summary.json").read_text()) for name in PARTS}
    assert {summary["items"] for summary in summaries.values()} == {2}
    text = page.read_text()
    scores = {name: f"{summary['metrics']['relaxed_overall']:.1%}" for name, summary in summaries.items()}
    title, runs = real_charts.FAMILIES[family]
    assert f"\n## {title}\n" in text
    assert f"| training questions it was trained on | 2 | {scores['memorised']} |" in text
    assert f"| test subset, all | 2 | {scores['test']} |" in text
    for name, variant in runs:
        first, last = real_charts.final_loss(workdir / variant / "metrics.jsonl")
        # A model that knows nothing has about the logarithm of Qwen2's 151,936 tokens, which is 11.9.
        assert 10 < first < 14
        assert f"| {name} | {first:.3f} | {last:.4f} |" in text
    assert ("peft makes of the base" in text) == (family == "lora")
    if family == "lora":
        base, run = workdir / real_charts.CAPTIONS / "model", workdir / runs[-1][1]
        assert peft_parity.main([f"--base={base}", f"--run={run}"]) == 0


def test_a_section_replaces_its_old_one_and_leaves_the_others():
    titles = [title for title, _ in real_charts.FAMILIES.values()]
    page = ""
    for title in (titles[2], titles[0], *titles[3:], titles[1]):
        page = real_charts.with_section(page, title, f"numbers of {title}")
    assert [line[3:] for line in page.splitlines() if line.startswith("## ")] == titles
    again = real_charts.with_section(page, titles[1], "others")
    assert again == page.replace(f"numbers of {titles[1]}", "others")
    assert again.startswith(real_charts.HEAD)


def test_the_page_of_results_has_every_family():
    page = (real_charts.ROOT / "docs" / "results" / "real_charts.md").read_text()
    for title, _ in real_charts.FAMILIES.values():
        section = page.split(f"\n## {title}\n")[1].split("\n## ")[0].strip()
        assert (
            section.startswith("Not measured: `python -m") or "| training questions it was trained on | 32 |" in section
        )


def test_missing_data_is_named(tmp_path, capsys):
    assert real_charts.main([f"--data={tmp_path}", f"--workdir={tmp_path / 'work'}"]) == 1
    assert "lacks natural/captions_llava.json" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def test_items_are_written_for_training_and_for_the_benchmark(tmp_path):
    """Both files hold the same questions, and the first word of a prompt is the image."""
    source = tmp_path / "chartqa"
    (source / "images").mkdir(parents=True)
    rows = [{"type": "human", "question": f"Q{i}?", "answer": f"A{i}", "image": f"images/{i}.png"} for i in range(3)]
    for row in rows:
        (source / row["image"]).write_bytes(row["question"].encode())
    (source / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert real_charts.write_items(source, tmp_path / "new", 2) == 2
    records = json.loads((tmp_path / "new/train.json").read_text())
    asked = [json.loads(line) for line in (tmp_path / "new/train.jsonl").read_text().splitlines()]
    assert asked == rows[:2]
    for record, row in zip(records, asked, strict=True):
        question, answer = record["conversations"]
        assert question["value"] == f"<image>\n{row['question']}\nAnswer the question with a single word."
        assert answer == {"from": "gpt", "value": row["answer"]}
        assert (tmp_path / "new" / record["image"]).read_bytes() == row["question"].encode()
