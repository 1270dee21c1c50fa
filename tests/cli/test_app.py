"""The command that serves the page: its flags, what it loads, and one line for everything that is wrong."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.app.made_up import Echo
from tests.commands import run
from tests.inference import tiny
from vr_jax.cli import app
from vr_jax.cli.flags import parse
from vr_jax.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("app")
    tiny.save(folder / "vr")
    tiny.save(folder / "pool", vision_remember=False)
    return folder


def flags(*arguments):
    return parse(app.AppFlags, list(arguments))


def test_the_page_starts_with_what_the_flags_say(folder):
    first = flags(
        f"--checkpoint={folder}/pool", "--pruning=fastv", "--dtype=bfloat16", "--max_new_tokens=9", "--seed=3"
    )
    second = flags(f"--checkpoint={folder}/vr", "--dtype=bfloat16")
    options = app.page_options([first, second])
    assert options.titles == (f"{folder}/pool", f"{folder}/vr")
    settings = options.settings
    assert (settings.max_new_tokens, settings.sampling.seed) == (9, 3)
    assert [(one.pruning, one.dtype) for one in settings.variants] == [("fastv", "bfloat16"), (None, "bfloat16")]
    pool, vr = options.checkpoints
    assert pool.pruners[0] == "fastv"
    assert pool.pruners.count("fastv") == 1
    assert all(app.fits(tiny.config(vision_remember=False), name) for name in pool.pruners)
    assert "pyramid_drop" not in pool.pruners, "its stages do not fit a decoder of three layers"
    assert (vr.pruners, vr.pruner_note) == ((), "Pruners drop the tokens that re-fusion blocks re-read.")


def test_the_longest_answer_is_that_of_the_checkpoint(folder, tmp_path):
    one = flags(f"--checkpoint={folder}/vr")
    assert app.page_options([one]).settings.max_new_tokens == app.MAX_NEW_TOKENS
    for file in (folder / "vr").iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    (tmp_path / "generation_config.json").write_text(json.dumps({"max_new_tokens": 33}))
    assert app.page_options([flags(f"--checkpoint={tmp_path}")]).settings.max_new_tokens == 33


def test_equal_checkpoints_are_told_apart(folder):
    one = flags(f"--checkpoint={folder}/pool")
    assert app.page_options([one, one]).titles == (f"{folder}/pool (1)", f"{folder}/pool (2)")


def test_only_this_machine_reaches_the_page_by_default():
    assert flags("--checkpoint=x").host == "127.0.0.1"
    assert [app.is_loopback(host) for host in ("127.0.0.1", "localhost", "::1", "127.8.0.1")] == [True] * 4
    assert [app.is_loopback(host) for host in ("0.0.0.0", "::", "192.168.0.1", "example.org")] == [False] * 4


def test_examples_are_images_with_questions(tmp_path, folder):
    examples = list(app.write_examples(tmp_path))
    assert len(examples) == 5
    for one in examples:
        assert one.question.endswith("?\nAnswer the question with a single word.")
        assert "<image>" not in one.question
    assert {one.image for one in examples} == {str(path) for path in tmp_path.iterdir()}


@pytest.fixture
def serve(folder, monkeypatch):
    """Runs the command with stand-ins for the models, until the page would wait; returns its status and what it did."""
    page = pytest.importorskip("vr_jax.app.page", reason="the page is part of the extra 'app'")
    done = {}

    def launch(blocks, host, port, *, folder):
        done["served"] = (host, port)
        done["shown"] = folder
        return f"http://{host}:{port or 7860}/"

    @contextlib.contextmanager
    def load(flags):
        done.setdefault("loaded", []).append((flags.checkpoint, flags.pruning, flags.dtype, flags.tensor))
        yield Echo(tiny.config()), None

    def stay():
        raise KeyboardInterrupt

    monkeypatch.setattr(page, "launch", launch)
    monkeypatch.setattr(app, "load_generator", load)
    monkeypatch.setattr(app, "stay", stay)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # The command sets it.

    def serve(**given):
        done.clear()
        return run("app", **given), done

    return serve


def test_both_checkpoints_are_loaded_before_the_page_is_served(serve, folder, capsys):
    checkpoints = {"checkpoint": folder / "vr", "compare": folder / "pool", "compare_pruning": "fastv"}
    status, done = serve(**checkpoints, tensor=2, port=8123)
    assert status == 130
    assert done["loaded"] == [(f"{folder}/vr", None, None, 2), (f"{folder}/pool", "fastv", None, 2)]
    assert done["served"] == ("127.0.0.1", 8123)
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        f"{folder}/vr is loaded",
        f"{folder}/pool is loaded",
        "the page is at http://127.0.0.1:8123/ (Ctrl-C ends it)",
    ]
    assert err == "vr-jax app: interrupted\n"


def test_what_is_uploaded_lies_beside_what_a_browser_shows_as_it_is_and_is_gone_at_the_end(serve, folder, monkeypatch):
    def stay():
        uploads = Path(os.environ["GRADIO_TEMP_DIR"])
        assert uploads.is_dir()
        kept.append(uploads)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)

    kept = []
    monkeypatch.setattr(app, "stay", stay)
    status, done = serve(checkpoint=folder / "vr")
    assert status == 130
    assert not kept[0].is_relative_to(done["shown"])
    assert not kept[0].exists()


def test_another_host_is_said_aloud(serve, folder, capsys):
    status, done = serve(checkpoint=folder / "vr", host="0.0.0.0")
    assert (status, done["served"]) == (130, ("0.0.0.0", None))
    assert "warning: --host=0.0.0.0 lets everyone who reaches this machine ask and upload" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"checkpoint": "{}/absent"}, "absent is not a model directory"),
        ({"checkpoint": "{}/vr", "compare": "{}/absent"}, "absent is not a model directory"),
        ({"checkpoint": "{}/vr", "pruning": "fastv"}, "pruners drop the tokens that re-fusion blocks re-read"),
        ({"checkpoint": "{}/pool", "pruning": "fastw"}, "did you mean 'fastv'?"),
        ({"checkpoint": "{}/vr", "compare_pruning": "fastv"}, "--compare_pruning has no effect without --compare"),
        ({"checkpoint": "{}/vr", "port": 0}, "--port=0: expected an integer >= 1 and <= 65535"),
    ],
)
def test_what_is_wrong_is_one_line(serve, folder, capsys, given, message):
    given = {name: value.format(folder) if isinstance(value, str) else value for name, value in given.items()}
    status, done = serve(**given)
    assert (status, done) == (2, {})
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_a_checkpoint_that_cannot_be_loaded_ends_the_command(serve, folder, capsys, monkeypatch):
    @contextlib.contextmanager
    def load(flags):
        raise UserError("the devices' memory does not suffice")
        yield

    monkeypatch.setattr(app, "load_generator", load)
    status, done = serve(checkpoint=folder / "vr")
    assert (status, done) == (2, {})
    assert capsys.readouterr().err == "vr-jax app: the devices' memory does not suffice\n"


def test_without_gradio_one_line_says_what_to_install(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "vr_jax.app.page", raising=False)
    monkeypatch.delattr("vr_jax.app.page", raising=False)
    assert run("app", checkpoint=folder / "vr") == 2
    err = capsys.readouterr().err
    assert err == "vr-jax app: the library gradio is not installed; pip install 'vr-jax[app]'\n"
