"""The command line: answers, conversations, and one clear line for everything that is wrong."""

from __future__ import annotations

import contextlib
import io
import zlib

import pytest
from PIL import ExifTags, Image

from tests.inference import tiny
from vr_jax.cli.main import main
from vr_jax.data.types import IMAGE, Conversation, Turn
from vr_jax.inference import Chat, Generator, Piece, Sampling, load_for_inference

LIMIT = ["--max_new_tokens", "6"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    tiny.save(folder / "model", vision_remember=False)
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
    turns = [Turn("user", IMAGE, "\nWhat is the word?")]
    assert (status, out) == (0, expected(generator, loaded, turns, [folder / "wide.png"]) + "\n")
    assert err == ""


@pytest.mark.slow  # A second prompt length is compiled; the tests below have several turns.
def test_several_images_and_turns_from_standard_input(folder, generator, loaded, capsys, monkeypatch):
    """A question that cannot be asked is reported and leaves the conversation as it was."""
    too_long = "x" * 40000
    monkeypatch.setattr("sys.stdin", io.StringIO(f"Which?\n{too_long}\nWhat does <image> mean?\n"))
    images = [folder / "wide.png", folder / "tall.png"]
    status, out, err = run(folder, "--image", images[0], "--image", images[1], capsys=capsys)
    turns = [Turn("user", IMAGE, " ", IMAGE, "\nWhich?")]
    first = expected(generator, loaded, turns, images)
    turns += [Turn("assistant", first), Turn("user", "What does <image> mean?")]
    second = expected(generator, loaded, turns, images)
    assert (status, out) == (0, f"{first}\n{second}\n")
    assert err.count("\n") == 1
    assert "the largest bucket holds" in err


class Echo:
    """Stands for a generator: a reply is a digest of the prompt, so that nothing is compiled."""

    def pieces(self, prompt, **_):
        yield Piece(f"{zlib.crc32(prompt.tokens.tobytes()):08x} ", 1)
        yield Piece("", 2)
        yield Piece(f"{zlib.crc32(prompt.tile_pixels.tobytes()):08x}", 3, "stop")


@pytest.fixture
def talk(folder, loaded, capsys, monkeypatch):
    """Types lines to a conversation with `Echo`."""

    @contextlib.contextmanager
    def load_generator(flags):
        yield Echo(), loaded.processor

    def typed(*lines, arguments=()):
        monkeypatch.setattr("vr_jax.cli.chat.load_generator", load_generator)
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return run(folder, *arguments, capsys=capsys)

    return typed


@pytest.fixture
def echo(loaded):
    """What `Echo` replies to a conversation."""

    def reply(turns, images=()):
        prompt = loaded.processor.prompt(Conversation("x", tuple(turns), tuple(images)))
        return "".join(piece.text for piece in Echo().pieces(prompt))

    return reply


def test_images_are_added_later_in_the_conversation(folder, talk, echo):
    status, out, err = talk(
        "Hi",
        f"/image {folder}/wide.png",
        "Which?",
        f"/image {folder}/tall.png",
        "And this?",
    )
    turns, answers, images = [], [], [folder / "wide.png", folder / "tall.png"]
    for question, count in (("Hi",), 0), ((IMAGE, "\nWhich?"), 1), ((IMAGE, "\nAnd this?"), 2):
        turns.append(Turn("user", *question))
        answers.append(echo(turns, images[:count]))
        turns.append(Turn("assistant", answers[-1]))
    assert (status, out, err) == (0, "".join(f"{answer}\n" for answer in answers), "")


def test_a_reset_forgets_everything_but_the_system_message(folder, talk, echo):
    arguments = ["--image", folder / "wide.png", "--system", "Be brief."]
    status, out, err = talk("What?", "/reset", "Hi", arguments=arguments)
    system = Turn("system", "Be brief.")
    first = echo([system, Turn("user", IMAGE, "\nWhat?")], [folder / "wide.png"])
    second = echo([system, Turn("user", "Hi")], [])
    assert (status, out, err) == (0, f"{first}\n{second}\n", "")
    assert echo([Turn("user", "Hi")]) != second


def test_mistakes_are_one_line_each_and_the_conversation_goes_on(folder, talk, echo):
    mistakes = {
        "/imgae x.png": "unknown command /imgae; did you mean /image? known: /image, /reset, /help, /exit",
        "/image": "/image FILE: the name of a file is missing",
        f"/image {folder}/absent.png": "absent.png does not exist",
        f"/image {folder}/wide.png {folder}/absent.png": "absent.png does not exist",
        f"/image {folder}/text.png": "has none of the formats",
        f"/image {folder}": "does not exist or is not a file",
        "/image 'x.png": "'x.png does not exist",
        "/image ~nobody_of_that_name/x.png": "the home folder ~nobody_of_that_name is not known",
    }
    status, out, err = talk(*mistakes, "/usr/bin is what <image>?", "/exit", "unread")
    answer = echo([Turn("user", "/usr/bin is what <image>?")], [])
    assert (status, out) == (0, answer + "\n")
    lines = err.splitlines()
    assert len(lines) == len(mistakes)
    for line, message in zip(lines, mistakes.values(), strict=True):
        assert line.startswith("vr-jax chat: ")
        assert message in line


def test_help_and_names_with_spaces(folder, talk, echo):
    (folder / "my photo.png").write_bytes((folder / "wide.png").read_bytes())
    lines = f"/image {folder}/my photo.png", f"/image '{folder}/my photo.png' {folder}/tall.png", "/help", "Which?"
    status, out, err = talk(*lines)
    images = [folder / "wide.png", folder / "wide.png", folder / "tall.png"]
    answer = echo([Turn("user", IMAGE, " ", IMAGE, " ", IMAGE, "\nWhich?")], images)
    assert out.startswith("/image FILE   adds an image")
    assert out.endswith(f"\n{answer}\n")
    assert (status, err) == (0, "")


def test_photographs_are_turned_as_transformers_does(folder, generator, loaded):
    load_image = pytest.importorskip("transformers.image_utils").load_image
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        path, turned = folder / f"photo{orientation}.jpg", folder / f"turned{orientation}.png"
        Image.open(io.BytesIO(tiny.png(60, 30, orientation))).save(path, exif=exif)
        load_image(str(path)).save(turned)
        seen = [Chat(Echo(), loaded.processor, [file]) for file in (path, turned)]
        replies = ["".join(chat.ask("Which?", 1, Sampling())) for chat in seen]
        assert replies[0] == replies[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "{}/absent", "Hi"], "absent is not a model directory"),
        (["--checkpoint", "{}", "Hi"], "is not a model directory: it has no config.json"),
        (["--image", "{}/absent.png", "Hi"], "absent.png does not exist"),
        (["--image", "{}/text.png", "Hi"], "text.png has none of the formats"),
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
