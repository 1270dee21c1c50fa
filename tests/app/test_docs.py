"""The commands of docs/app.md exist, and each of them serves a page with a tiny model."""

from __future__ import annotations

import pytest

from tests.docs import commands
from tests.inference import tiny
from vr_jax.cli import app
from vr_jax.cli.flags import parse
from vr_jax.cli.main import main

COMMANDS = commands("app.md")


def test_every_flag_exists():
    assert len(COMMANDS) == 4
    for command, *rest in COMMANDS:
        assert command == "app"
        parse(app.AppFlags, rest)


@pytest.mark.slow  # It loads tiny models and answers one question.
def test_every_command_serves_a_page(tmp_path, monkeypatch, capsys):
    page = pytest.importorskip("vr_jax.app.page", reason="the page is part of the extra 'app'")
    for name, vision_remember in (("demo", True), ("phase2", True), ("pooling", False)):
        tiny.save(tmp_path / "runs" / name / "model", vision_remember=vision_remember)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # The command sets it.
    served = []

    def launch(blocks, host, port, *, folder):
        served.append((len(blocks.config["components"]) > 10, host, port))
        return "the address"

    def stay():
        raise KeyboardInterrupt

    monkeypatch.setattr(page, "launch", launch)
    monkeypatch.setattr(app, "stay", stay)
    for words in COMMANDS:
        assert main(words) == 130, capsys.readouterr().err
    assert served == [(True, "127.0.0.1", None)] * 3 + [(True, "127.0.0.1", 8000)]
