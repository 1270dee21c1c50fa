"""Every command that reads a model, on a tiny model directory of each family, as a user calls it."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from tests.commands import run
from tests.family_runs import FAMILIES, save_family, small_config
from tests.inference import tiny
from vr_jax.data.texts import place_images
from vr_jax.data.types import Conversation, Turn
from vr_jax.efficiency import JSON
from vr_jax.evaluation import load_results
from vr_jax.evaluation.lmms_eval.answers import Answerer
from vr_jax.evaluation.lmms_eval.questions import Question, Settings
from vr_jax.inference import Generator, Sampling, load_for_inference
from vr_jax.probe import read_results, write_stand_in

LIMIT = 5
# A wide, a small and a square image: other numbers of tiles and other grids in each family.
SIZES = {"wide": (60, 22), "small": (18, 14), "square": (48, 48)}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    """A model directory and images."""
    folder = tmp_path_factory.mktemp(family)
    save_family(folder / "model", small_config(family))
    for number, (name, size) in enumerate(SIZES.items()):
        (folder / f"{name}.png").write_bytes(tiny.png(*size, number))
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    return load_for_inference(folder / "model")


@pytest.fixture(scope="module")
def generator(loaded):
    return Generator(loaded.model, loaded.tokenizer, settings=loaded.generation)


def user(loaded, text: str, images: int = 0) -> Turn:
    """A question behind its images, as the format separates them."""
    between, behind = loaded.processor.encoder.separators
    return Turn("user", *place_images([between.join(["<image>"] * images) + behind * (images > 0) + text], images)[0])


def expected(loaded, generator, *turns: Turn, images=()) -> str:
    prompt = loaded.processor.prompt(Conversation("x", tuple(turns), tuple(images)))
    return generator.generate([prompt], max_new_tokens=LIMIT)[0].text


# Prompts of two lengths and their decode loops are compiled, twice since a command has programs of its own.
@pytest.mark.slow
def test_a_conversation_with_images_in_a_later_turn(folder, loaded, generator, capsys, monkeypatch):
    """What is streamed is what the whole conversation gives at once; the later image changes the reply's prompt."""
    lines = f"What is the word?\n/image {folder / 'small.png'}\nWhat colour is the word?\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    flags = {"checkpoint": folder / "model", "image": folder / "wide.png", "max_new_tokens": LIMIT}
    assert run("chat", **flags) == 0
    out, err = capsys.readouterr()
    assert err == ""
    images = [folder / "wide.png", folder / "small.png"]
    first = user(loaded, "What is the word?", 1)
    reply = expected(loaded, generator, first, images=images[:1])
    second = user(loaded, "What colour is the word?", 1)
    last = expected(loaded, generator, first, Turn("assistant", reply), second, images=images)
    assert out == f"{reply}\n{last}\n"


# A batch over eight devices and the same prompts alone are compiled.
@pytest.mark.slow
def test_a_batch_of_questions_equals_each_alone(folder, loaded, generator, tmp_path, capsys):
    asked = [("wide", ["wide"]), ("two", ["square", "small"]), ("text", []), ("square", ["square"])]
    lines = [
        {"id": name, "question": "Which colour?", "images": [str(folder / f"{one}.png") for one in images]}
        for name, images in asked
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = {"input": tmp_path / "in.jsonl", "output": tmp_path / "out.jsonl", "max_new_tokens": LIMIT}
    assert run("generate", checkpoint=folder / "model", batch_size=8, **flags) == 0
    assert "wrote 4 answers" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    for row, (name, images) in zip(rows, asked, strict=True):
        paths = [folder / f"{one}.png" for one in images]
        alone = expected(loaded, generator, user(loaded, "Which colour?", len(images)), images=paths)
        assert (row["id"], row["answer"]) == (name, alone)


# The evaluation compiles a batch, and its heat maps another program.
@pytest.mark.slow
def test_the_demo_benchmark_and_its_report_with_heat_maps(family, folder, tmp_path, capsys):
    flags = {"benchmark": "demo", "limit": 6, "batch_size": 8, "report_items": 4, "output": tmp_path}
    assert run("eval", checkpoint=folder / "model", **flags) == 0
    assert "Demo" in capsys.readouterr().out
    results = list(load_results(tmp_path / "demo"))
    assert len(results) == 6
    assert not [result.error for result in results if result.error]
    page = next(tmp_path.rglob("report.html")).read_text()
    assert page.count("<article") == 4
    assert page.count('class="map"') >= 4, "every item shows where its image was read again"


def test_pruners_are_refused_in_one_line(family, folder, capsys):
    """Pruners drop the tokens that the blocks re-read, and they are defined for square tiles."""
    message = {
        "llava": "pruning 'fastv' with re-fusion block 'vision_remember': pruners drop the tokens that re-fusion",
        "qwen2_5_vl": "pruning 'fastv' with the encoder 'qwen2_5_vision': the pruners are defined for square tiles",
        "minicpm_v": "pruning 'fastv' with the encoder 'siglip_slices': the pruners are defined for square tiles",
    }[family]
    assert run("chat", "What?", checkpoint=folder / "model", pruning="fastv") == 2
    assert_one_line(capsys, message)
    flags = {"benchmark": "demo", "limit": 1, "output": folder / "pruned"}
    assert run("eval", checkpoint=folder / "model", pruning="fastv", **flags) == 2
    assert_one_line(capsys, message)


def assert_one_line(capsys, message: str) -> None:
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert message in err


# A prefill and a decode loop are compiled and measured.
@pytest.mark.slow
def test_efficiency(family, folder, tmp_path, capsys):
    flags = {"image": "config", "repeats": 1, "warmup": 1, "new_tokens": 3, "text_tokens": 60, "output": tmp_path}
    assert run("efficiency", checkpoint=folder / "model", image_size="48x48", **flags) == 0
    assert "model" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / JSON).read_text())["systems"]
    # A base tile and four; 3 x 3 windows of an image of 5 x 5 cells; an overview and four slices of 3 x 3 tokens.
    sizes = {"llava": (5, 51), "qwen2_5_vl": (9, 25), "minicpm_v": (5, 45)}[family]
    assert (row["tiles"], row["vision_tokens"]) == sizes


# The model's states and the heads are compiled.
@pytest.mark.slow
def test_the_probe(family, folder, tmp_path, capsys):
    """It squashes an image to one square tile, so that it can be asked about encoders of square tiles only."""
    write_stand_in(tmp_path / "data", classes=2, train=4, val=2)
    heads = {"layers": "1,2", "seeds": 1, "width": 16, "heads": 2, "epochs": 1, "batch_size": 8}
    flags = {"checkpoint": folder / "model", "data": tmp_path / "data", "output": tmp_path / "out", "train_images": 8}
    status = run("probe", **flags, val_images=4, **heads)
    if family == "llava":
        assert status == 0
        names = [tap.name for tap in read_results(tmp_path / "out").taps]
        assert names == ["encoder", "compressor", "projector", "layer 1", "layer 1 + vision_remember", "layer 2"]
    else:
        assert status == 2
        assert "squashes an image to one square tile, which the encoder" in capsys.readouterr().err.splitlines()[-1]


# lmms-eval's requests are answered in batches, and likelihoods compile a program of their own.
@pytest.mark.slow
def test_the_model_class_of_lmms_eval(folder, loaded, generator):
    """Requests of mixed images get the answers of each alone, and a reply has the loss that the answer says."""
    answerer = Answerer(generator, loaded.processor, batch_size=4, progress=False)
    images = {name: Image.open(folder / f"{name}.png").convert("RGB") for name in SIZES}
    questions = [Question(name, "Which colour?", lambda one=one: [one]) for name, one in images.items()]
    answers = answerer.answer(questions, [Settings(LIMIT, Sampling())] * len(questions))
    for name, answer in zip(images, answers, strict=True):
        turn = user(loaded, "Which colour?", 1)
        assert answer.text == expected(loaded, generator, turn, images=[folder / f"{name}.png"])
        assert answer.problem is None
    scores = answerer.score(questions[:2], ["red", "green"])
    assert all(np.isfinite(score.loss) and score.loss > 0 for score in scores)
