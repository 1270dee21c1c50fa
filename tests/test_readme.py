"""All commands and Python of README.md and docs/first_steps.md run, with tiny models in the place of real ones."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.docs import check_command
from tools.code_blocks import console_lines, read_blocks
from tools.tiny_files import TINY, flags_of, write_data, write_models
from vr_jax.cli import plan as plan_command
from vr_jax.cli.main import main
from vr_jax.plan import topology

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "first_steps.md")

BLOCKS = [block for page in PAGES for block in read_blocks(page.read_text(encoding="utf-8"))]
CONSOLE_LINES = [words for block in BLOCKS if block.language == "console" for words in console_lines(block.text)]
PROGRAM_LINES = [words for words in CONSOLE_LINES if words[0] == "vr-jax"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with tiny files under the names that the page uses, as if they had been downloaded."""
    pytest.importorskip("torch", reason="tiny Hugging Face models are made with torch")
    root = tmp_path_factory.mktemp("readme")
    write_models(root)
    write_data(root)
    return root


def shrunk(words: list[str]) -> list[str]:
    """A command with the flags that make it tiny."""
    command = words[1]
    if command == "demo":
        return [*words, "--steps=1", "--pages=40", "--held_out=10", "--systems=vision_remember_9,pooling_9"]
    if command in ("train", "plan"):
        return [*words, *flags_of(TINY)]
    if command == "chat":
        return [*words, "--max_new_tokens=4"]
    return words


@pytest.mark.parametrize("line", [shlex.join(words) for words in PROGRAM_LINES])
def test_commands_have_flags_and_configs_that_exist(line: str):
    check_command(shlex.split(line)[1:])


def test_all_main_commands_are_shown():
    assert {words[1] for words in PROGRAM_LINES} >= {"demo", "chat", "convert", "train", "eval", "plan", "experiments"}


@pytest.mark.slow
def test_everything_on_the_pages_runs(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    """In the order of the pages, in an empty folder but for the files that a user would have downloaded."""
    monkeypatch.chdir(folder)
    # JAX runs already in this process, on the eight devices that the page's plan asks for.
    monkeypatch.setattr(plan_command, "prepare_process", topology.parse)
    run = []
    for block in BLOCKS:
        if block.language == "python":
            exec(compile(block.text, "the page", "exec"), {})
            continue
        for words in console_lines(block.text):
            if words[:2] == ["python", "-c"]:
                exec(words[2], {})
            elif words in run:
                continue  # The two pages share some commands.
            elif words[0] == "vr-jax":
                run.append(words)
                assert main(shrunk(words)[1:]) == 0, f"{words}: {capfd.readouterr().err}"
            else:
                # The wheel is tested where it is built.
                assert words[:2] in (["python3", "-m"], ["pip", "install"]), words
    assert (folder / "runs/demo/report.html").is_file()
    assert (folder / "runs/phase2/eval/report.html").is_file()
