"""The examples of docs/convert.md run as they are written."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.convert.conftest import transformers
from tools.code_blocks import console_lines, read_blocks
from vr_jax.model_directory import load_params

PAGE = Path(__file__).resolve().parents[2] / "docs" / "convert.md"
EXAMPLE = "## Trying it without a download"


def blocks(text: str) -> list[tuple[str, str]]:
    """Language and content of every code block."""
    return [(block.language, block.text) for block in read_blocks(text)]


def commands(block: str) -> list[list[str]]:
    """The arguments of the `vr-jax convert` commands of a block."""
    return [words[2:] for words in console_lines(block) if words[:2] == ["vr-jax", "convert"]]


def test_the_example_runs(tmp_path, monkeypatch, converted, capsys):
    monkeypatch.chdir(tmp_path)
    setup, console, python = blocks(PAGE.read_text().split(EXAMPLE)[1])
    assert [language for language, _ in (setup, console, python)] == ["python", "console", "python"]
    exec(setup[1], {})
    assert len(commands(console[1])) == len(console[1].strip().splitlines()) > 5
    for arguments in commands(console[1]):
        converted(*arguments)
    first, again = load_params("model"), load_params("model-again")
    assert first.keys() == again.keys()
    for path, value in first.items():
        np.testing.assert_array_equal(value, again[path])
    transformers.LlavaOnevisionForConditionalGeneration.from_pretrained("back-to-hf")

    capsys.readouterr()
    names = {}
    exec(python[1], names)
    assert {path.split(".")[0] for path in names["report"].initialised} == {"projector", "image_newline"}
    assert "projector.fc1.kernel" in capsys.readouterr().out
    assert load_params("copy").keys() == first.keys()


def test_commands_for_real_checkpoints_are_refused_only_because_those_are_absent(tmp_path, monkeypatch, convert):
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text().split(EXAMPLE)[0]
    found = [arguments for language, block in blocks(text) if language == "console" for arguments in commands(block)]
    assert len(found) == 5
    for arguments in found:
        status, _, err = convert(*arguments)
        assert status == 2
        absent = "/models/" in err and "is not a folder of a checkpoint" in err
        assert absent or "adapter_config.json is missing" in err
