"""vr_jax inside the real lmms-eval, in its own environment (docs/lmms_eval.md), against vr_jax's own evaluation.

Needs VR_JAX_LMMS_EVAL_PYTHON: the Python of that environment. One run of the real program answers the stock task
ChartQA from local parquet files and two tasks over local data; the tests read what it wrote."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
from pathlib import Path

import jax
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.golden.discovery import DATA_ROOT, REPOSITORY
from tests.inference import tiny
from vr_jax.data.texts import place_images
from vr_jax.data.types import Conversation
from vr_jax.evaluation.benchmarks import get_benchmark
from vr_jax.evaluation.lmms_eval.answers import Answerer
from vr_jax.evaluation.lmms_eval.questions import Question
from vr_jax.evaluation.runner import evaluate_items
from vr_jax.inference import Generator, load_for_inference, user_turn
from vr_jax.sharding import make_mesh

PYTHON = os.environ.get("VR_JAX_LMMS_EVAL_PYTHON", "")
pytestmark = pytest.mark.skipif(
    not PYTHON,
    reason="VR_JAX_LMMS_EVAL_PYTHON is not set: the Python of an environment made by tools/setup_lmms_eval.sh",
)
COUNT = 32  # ChartQA items
BATCH_SIZE = 8
NEW_TOKENS = 16
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

FEATURES = {name: {"dtype": "string", "_type": "Value"} for name in ("type", "question", "answer")}
README = """---
configs:
- config_name: default
  data_files:
  - split: test
    path: data/test-*
---
"""
TASK_CODE = """
from PIL import Image


def visuals(doc):
    if doc["images"] == ["clip.mp4"]:
        return ["clip.mp4"]
    return [Image.open(name) for name in doc["images"]]


def text(doc):
    return doc["question"]


def choices(doc):
    return doc["choices"]


def exact(doc, results):
    return {"exact": float(results[0] == doc["answer"])}
"""


# --- data


def chartqa_rows() -> list[dict]:
    """Real rows where they are, half of each split; else noise in the same columns."""
    folder = DATA_ROOT / "chartqa"
    if (folder / "test.jsonl").exists():
        lines = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
        kinds = ("human_test", "augmented_test")
        chosen = [row for kind in kinds for row in [one for one in lines if one["type"] == kind][: COUNT // 2]]
        return [{**row, "bytes": (folder / row["image"]).read_bytes()} for row in chosen]
    return [
        {
            "type": "human_test" if i < COUNT // 2 else "augmented_test",
            "question": f"What is number {i}?",
            "answer": str(i),
            "bytes": tiny.png(20 + 3 * i, 40, i),
        }
        for i in range(COUNT)
    ]


def write_chartqa(folder: Path, rows: list[dict]) -> None:
    """The published layout: one parquet file with the images inside, and the features in its metadata."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([*((name, pa.string()) for name in FEATURES), ("image", image)])
    features = FEATURES | {"image": {"_type": "Image"}}
    schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    records = [{**row, "image": {"bytes": row["bytes"], "path": f"{i}.png"}} for i, row in enumerate(rows)]
    (folder / "data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(records, schema), folder / "data" / "test-00000-of-00001.parquet")
    (folder / "README.md").write_text(README)


def write_task(folder: Path, name: str, rows: list[dict], fields: dict) -> None:
    """A task of lmms-eval over a parquet file, as a user would write it (YAML is a superset of JSON)."""
    pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    values = {
        "task": name,
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.parquet")}},
        "test_split": "test",
        **fields,
    }
    functions = "".join(f"{field}: !function utils.{function}\n" for field, function in values.pop("functions").items())
    body = "".join(f"{key}: {json.dumps(value)}\n" for key, value in values.items())
    (folder / f"{name}.yaml").write_text(body + functions)
    (folder / "utils.py").write_text(TASK_CODE)


# --- vr_jax's own answers


@dataclasses.dataclass
class Own:
    """The checkpoint, loaded as eval.py does."""

    folder: Path

    def __post_init__(self):
        self.mesh = make_mesh()
        loaded = load_for_inference(tiny.save(self.folder / "model"), self.mesh)
        self.processor = loaded.processor
        with jax.set_mesh(self.mesh):
            self.generator = Generator(loaded.model, loaded.tokenizer)

    def evaluate(self, items, name):
        with jax.set_mesh(self.mesh):
            return evaluate_items(
                self.generator,
                self.processor,
                get_benchmark("chartqa"),
                items,
                self.folder / name,
                batch_size=BATCH_SIZE,
                progress=False,
            )

    def reply(self, question: str, images: list[str]) -> str:
        images = tuple(Path(name) for name in images)
        prompt = self.processor.prompt(
            Conversation("x", (user_turn(place_images([question], len(images))[0], len(images)),), images)
        )
        with jax.set_mesh(self.mesh):
            return self.generator.generate([prompt], max_new_tokens=NEW_TOKENS, rows=BATCH_SIZE)[0].text

    def losses(self, rows: list[dict]) -> list[list[float]]:
        from PIL import Image

        with jax.set_mesh(self.mesh):
            answerer = Answerer(self.generator, self.processor, batch_size=BATCH_SIZE, progress=False)
            asked = [
                Question("x", row["question"], lambda row=row: [Image.open(name) for name in row["images"]])
                for row in rows
                for _ in row["choices"]
            ]
            scores = answerer.score(asked, [f" {choice}" for row in rows for choice in row["choices"]])
        found = iter(scores)
        return [[next(found).loss for _ in row["choices"]] for row in rows]


@dataclasses.dataclass(frozen=True)
class Hosted:
    """What was asked, what vr_jax itself says, and the folder in which lmms-eval ran."""

    folder: Path
    chartqa: object
    words: list[dict]
    choices: list[dict]
    losses: list[list[float]]
    process: subprocess.CompletedProcess

    def samples(self, task: str) -> list[dict]:
        (path,) = self.folder.glob(f"out/**/*_samples_{task}.jsonl")
        return sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda one: one["doc_id"])

    def metrics(self, task: str) -> dict[str, float]:
        (path,) = self.folder.glob("out/**/*_results.json")
        found = json.loads(path.read_text())["results"][task]
        return {name.removesuffix(",none"): value for name, value in found.items() if "stderr" not in name}


@pytest.fixture(scope="module")
def hosted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosted")
    own = Own(folder)
    benchmark = get_benchmark("chartqa")
    rows = chartqa_rows()
    # An untrained model is right about nothing, and equal zeros prove little: some references become its replies.
    first = own.evaluate([benchmark.item(str(i), row, (row["bytes"],)) for i, row in enumerate(rows)], "first")
    for i, result in enumerate(first.results):
        if i % 3 == 0 or (i % 4 == 1 and rows[i]["type"] == "human_test"):
            rows[i]["answer"] = result.prediction
    stock = folder / "lmms-lab-encoder" / "ChartQA"
    write_chartqa(stock, rows)
    chartqa = own.evaluate(benchmark.items(stock, None), "second")

    tasks = folder / "tasks"
    tasks.mkdir()
    for i in range(5):
        (tasks / f"{i}.png").write_bytes(tiny.png(20 + 8 * i, 30, i))
    names = [str(tasks / f"{i}.png") for i in range(5)]
    words = [
        {"question": "What is it?", "images": names[:1]},
        {"question": "What is the word?", "images": []},
        {"question": "<image> <image> Too many?", "images": names[:1]},
        {"question": "Which is larger?", "images": names[1:3]},
        {"question": "Look: <image> then <image>. Which?", "images": names[3:5]},
        {"question": "word " * 40_000, "images": names[:1]},
        {"question": "What moves?", "images": ["clip.mp4"]},
        {"question": "What is missing?", "images": [str(tasks / "no.png")]},
    ]
    bad = {2: "image_count", 5: "too_long", 6: "malformed_record", 7: "malformed_record"}
    for i, row in enumerate(words):
        row["problem"] = bad.get(i, "")
        row["answer"] = "" if i in bad else own.reply(row["question"], row["images"])
    words[3]["reply"], words[3]["answer"] = words[3]["answer"], "something else"
    words = [{"reply": row["answer"], **row} for row in words]
    functions = {"doc_to_visual": "visuals", "doc_to_text": "text"}
    mean = {"aggregation": "mean", "higher_is_better": True}
    write_task(
        tasks,
        "vr_jax_words",
        words,
        {
            "output_type": "generate_until",
            "doc_to_target": "answer",
            # Would cut the first reply to nothing.
            "generation_kwargs": {"max_new_tokens": NEW_TOKENS, "until": [words[0]["reply"][0]]},
            "metric_list": [{"metric": "exact", **mean}],
            "functions": functions | {"process_results": "exact"},
        },
    )
    choices = [
        {"question": f"Which colour? {i}", "images": names[: i % 3], "choices": ["red", "dark green", "blue 17"]}
        for i in range(6)
    ]
    losses = own.losses(choices)
    for i, (row, loss) in enumerate(zip(choices, losses, strict=True)):
        row["label"] = (loss.index(min(loss)) + (i % 3 == 0)) % 3
    write_task(
        tasks,
        "vr_jax_choices",
        choices,
        {
            "output_type": "multiple_choice",
            "doc_to_target": "label",
            "metric_list": [{"metric": "acc", **mean}],
            "functions": functions | {"doc_to_choice": "choices"},
        },
    )
    command = [
        *(PYTHON, "-m", "lmms_eval", "--model=vr_jax", "--model_args=checkpoint=model", f"--batch_size={BATCH_SIZE}"),
        *("--tasks=chartqa,vr_jax_words,vr_jax_choices", f"--include_path={tasks}"),
        *("--log_samples", "--output_path=out"),
    ]
    environment = {**ENVIRONMENT, "HF_HOME": str(folder / "hf")}
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-5000:]
    assert "Error during evaluation" not in process.stdout + process.stderr, process.stderr[-5000:]
    yield Hosted(folder, chartqa, words, choices, losses, process)
    shutil.rmtree(folder / "hf", ignore_errors=True)


def test_chartqa_replies_are_the_same_item_by_item(hosted):
    samples = hosted.samples("chartqa")
    assert len(samples) == COUNT
    for sample, result in zip(samples, hosted.chartqa.results, strict=True):
        assert sample["target"] == result.answers[0]
        assert _only(sample["filtered_resps"]).strip() == result.prediction
        assert sample["relaxed_overall"] == result.score


def test_chartqa_scores_are_the_same_and_neither_none_nor_all(hosted):
    metrics = hosted.metrics("chartqa")
    names = {"relaxed_overall", "relaxed_human_split", "relaxed_augmented_split"}
    assert names <= metrics.keys()
    for name in names:
        assert metrics[name] == pytest.approx(hosted.chartqa.summary["metrics"][name], abs=1e-12)
        assert 0 < metrics[name] < 1
    assert len({metrics[name] for name in names}) == 3


def test_a_task_over_local_data(hosted):
    """Several images, none, placeholders inside the text; `until` does not cut."""
    samples = hosted.samples("vr_jax_words")
    replies = [_only(sample["filtered_resps"]).strip() for sample in samples]
    assert replies == [row["reply"].strip() for row in hosted.words]
    right = [reply == row["answer"] for reply, row in zip(replies, hosted.words, strict=True)]
    assert 0 < sum(right) < len(right)
    assert hosted.metrics("vr_jax_words")["exact"] == pytest.approx(sum(right) / len(right))


def test_requests_that_cannot_be_asked_do_not_end_the_run(hosted):
    count = 0
    for i, row in enumerate(hosted.words):
        line = f"vr_jax_words/test/{i} was not answered: {row['problem']}"
        assert (line in hosted.process.stderr) == bool(row["problem"]), hosted.process.stderr[-5000:]
        count += bool(row["problem"])
    assert count == 4
    assert f"{count} of {COUNT + len(hosted.words)} requests were not answered" in hosted.process.stderr


def test_choices_are_the_most_likely_ones(hosted):
    """lmms-eval takes the smallest value, so that must be the loss."""
    samples = hosted.samples("vr_jax_choices")
    for sample, losses, row in zip(samples, hosted.losses, hosted.choices, strict=True):
        assert [float(loss) for loss, _ in sample["filtered_resps"]] == pytest.approx(losses, rel=1e-5)
        assert sample["acc"] == float(losses.index(min(losses)) == row["label"])
    assert hosted.metrics("vr_jax_choices")["acc"] == pytest.approx(4 / 6)


MISTAKES = """
import json, os, sys
from types import SimpleNamespace
from lmms_eval.models import get_model

VrJax = get_model("vr_jax")
found = {}
for name, arguments in json.loads(sys.argv[1]).items():
    try:
        model = VrJax.create_from_arg_string(arguments, {"batch_size": 1, "device": None})
        model.generate_until_multi_round([SimpleNamespace(task_name="talk")])
    except (SystemExit, NotImplementedError) as error:
        found[name] = [type(error).__name__, str(error)]
os.environ["WORLD_SIZE"] = "2"
try:
    VrJax.create_from_arg_string("checkpoint=model", {})
except SystemExit as error:
    found["world"] = [type(error).__name__, str(error)]
print(json.dumps(found))
"""


def test_mistakes_are_one_line(hosted):
    arguments = {
        "missing": "",
        "nowhere": "checkpoint=nowhere",
        "unknown": "checkpoint=model,size=3",
        "mesh": "checkpoint=model,tensor=3",
        "pruning": 'checkpoint=model,pruning={"name":"fastv","keep":0.25}',
        "rounds": "pretrained=model,batch_size=8",
    }
    process = subprocess.run(
        [PYTHON, "-c", MISTAKES, json.dumps(arguments)],
        cwd=hosted.folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-5000:]
    found = json.loads(process.stdout.splitlines()[-1])
    expected = {
        "missing": ("SystemExit", "set --model_args checkpoint=DIR"),
        "nowhere": ("SystemExit", "nowhere is not a model directory"),
        "unknown": ("SystemExit", "model_args has the unknown names ['size']"),
        "mesh": ("SystemExit", "mesh replica=1 x fsdp=-1 x tensor=3"),
        "pruning": ("SystemExit", "pruning 'fastv' with re-fusion block"),
        "rounds": ("NotImplementedError", "vr_jax does not answer tasks of several rounds (talk)"),
        "world": ("SystemExit", "start lmms_eval with python, not with torchrun or accelerate launch"),
    }
    assert found.keys() == expected.keys()
    for name, (kind, message) in expected.items():
        assert found[name][0] == kind, found[name]
        assert message in found[name][1]
        assert "\n" not in found[name][1]


def test_the_environment_runs_this_tree():
    """Else the tests above would prove something about another vr_jax."""
    code = "import vr_jax; print(vr_jax.__file__)"
    process = subprocess.run([PYTHON, "-c", code], cwd="/", capture_output=True, text=True, check=True)
    assert Path(process.stdout.strip()) == REPOSITORY / "vr_jax" / "__init__.py"


def _only(responses) -> str:
    return responses if isinstance(responses, str) else responses[0]
