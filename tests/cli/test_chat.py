"""The command line: answers, conversations, and one clear line for everything that is wrong."""

from __future__ import annotations

import io

import pytest

from tests.inference import tiny
from vr_jax.cli.main import main
from vr_jax.data.types import Conversation, Turn
from vr_jax.inference import Generator, load_for_inference

LIMIT = ["--max_new_tokens", "6"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    tiny.save(folder / "model")
    (folder / "wide.png").write_bytes(tiny.png(60, 30, 1))
    (folder / "tall.png").write_bytes(tiny.png(24, 48, 2))
    (folder / "text.png").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    return load_for_inference(folder / "model")


@pytest.fixture(scope="module")
def generator(loaded):
    return Generator(loaded.model, loaded.tokenizer, tiny.BUCKETS)


def run(folder, *arguments, capsys):
    status = main(["chat", "--checkpoint", str(folder / "model"), *LIMIT, *map(str, arguments)])
    return status, *capsys.readouterr()


def expected(generator, loaded, turns, images):
    prompt = loaded.processor.prompt(Conversation("x", tuple(turns), tuple(images)))
    return generator.generate([prompt], max_new_tokens=6)[0].text


def test_a_question_about_a_image(folder, generator, loaded, capsys):
    status, out, err = run(folder, "--image", folder / "wide.png", "What is the word?", capsys=capsys)
    turns = [Turn("user", "<image>\nWhat is the word?")]
    assert (status, out) == (0, expected(generator, loaded, turns, [folder / "wide.png"]) + "\n")
    assert err == ""


def test_several_images_and_turns_from_standard_input(folder, generator, loaded, capsys, monkeypatch):
    """A question that cannot be asked is reported and leaves the conversation as it was."""
    monkeypatch.setattr("sys.stdin", io.StringIO("Which?\nIs <image> it?\nWhat?\n"))
    images = [folder / "wide.png", folder / "tall.png"]
    status, out, err = run(folder, "--image", images[0], "--image", images[1], capsys=capsys)
    turns = [Turn("user", "<image> <image>\nWhich?")]
    first = expected(generator, loaded, turns, images)
    turns += [Turn("assistant", first), Turn("user", "What?")]
    second = expected(generator, loaded, turns, images)
    assert (status, out) == (0, f"{first}\n{second}\n")
    assert err.count("\n") == 1
    assert "1 <image> placeholder(s) for 0 image(s)" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "{}/absent", "Hi"], "absent is not a model directory"),
        (["--checkpoint", "{}", "Hi"], "is not a model directory: it has no config.json"),
        (["--image", "{}/absent.png", "Hi"], "absent.png does not exist"),
        (["--image", "{}/text.png", "Hi"], "text.png has none of the formats"),
        (["--image", "{}/wide.png", "<image> <image>?"], "2 <image> placeholder(s) for 1 image(s)"),
        (["What is <image>?"], "1 <image> placeholder(s) for 0 image(s)"),
        (["--max_new_tokens", "0", "Hi"], "--max_new_tokens=0: expected an integer >= 1"),
        (["--tensor", "99", "Hi"], "needs a multiple of 99 devices"),
        (["x" * 40000], "the largest bucket holds 32768"),
    ],
)
def test_what_is_wrong_is_one_line(folder, capsys, arguments, message):
    status, out, err = run(folder, *(a.format(folder) if "{}" in a else a for a in arguments), capsys=capsys)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert message in err


def test_a_checkpoint_without_tokenizer(folder, tmp_path, capsys):
    for name in ("config.json", "_COMPLETE"):
        (tmp_path / name).write_bytes((folder / "model" / name).read_bytes())
    assert main(["chat", "--checkpoint", str(tmp_path), "Hi"]) == 2
    err = capsys.readouterr().err
    assert "has no usable tokenizer" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--temperature", "-1"], ["--top_p", "2"], []])
def test_bad_arguments_name_themselves(folder, capsys, arguments):
    assert main(["chat", *(["--checkpoint", str(folder)] if arguments else []), *arguments, "Hi"]) == 2
    assert (arguments[0] if arguments else "--checkpoint") in capsys.readouterr().err
