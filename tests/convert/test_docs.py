"""The example of docs/convert.md runs as it is written."""

import re
import shlex
from pathlib import Path

import numpy as np

from tests.convert.conftest import transformers
from vr_jax.model_directory import load_params

PAGE = Path(__file__).resolve().parents[2] / "docs" / "convert.md"


def test_the_example_runs(tmp_path, monkeypatch, converted):
    monkeypatch.chdir(tmp_path)
    example = PAGE.read_text().split("## Trying it without a download")[1]
    setup, commands = re.findall(r"```\w+\n(.*?)```", example, re.DOTALL)
    exec(setup, {})
    lines = commands.strip().splitlines()
    assert len(lines) > 5
    for line in lines:
        program, arguments = shlex.split(line)[:2], shlex.split(line)[2:]
        assert program == ["vr-jax", "convert"]
        converted(*arguments)
    first, again = load_params("model"), load_params("model-again")
    assert first.keys() == again.keys()
    for path, value in first.items():
        np.testing.assert_array_equal(value, again[path])
    transformers.LlavaOnevisionForConditionalGeneration.from_pretrained("back-to-hf")
