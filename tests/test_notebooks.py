"""The notebooks are valid, hold no outputs, and their cells run in order with a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))
# What the cell of parameters is given in the test, beside what it sets itself.
TINY: dict[str, dict[str, Any]] = {
    "chat_and_heat_maps": {"PAGES": 64, "STEPS": 2},
    "train_on_own_images": {"STEPS": 2},
}


def cells(path: Path) -> list[dict[str, Any]]:
    """The cells with their source as one text."""
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in found]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_is_valid_and_holds_no_outputs(path: Path):
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(nbformat.read(path, as_version=4))
    for cell in cells(path):
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
        assert not any(place in cell["source"] for place in ("/work/", "/home/", "/tmp/", "/content/"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_first_cell_of_code_installs_from_a_variable(path: Path):
    first = next(cell["source"] for cell in cells(path) if cell["cell_type"] == "code")
    assert first.startswith('REPOSITORY = ""')
    assert cells(path)[0]["cell_type"] == "markdown"
    assert "**What to change:**" in cells(path)[0]["source"]
    assert "## When it fails" in cells(path)[-1]["source"]


@pytest.mark.slow  # each trains and asks a model
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_cells_run_in_order(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    given = 0
    for number, cell in enumerate(cells(path)):
        if cell["cell_type"] != "code":
            continue
        exec(compile(cell["source"], f"{path.name}, cell {number}", "exec"), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            assert TINY[path.stem].keys() <= names.keys()
            names |= TINY[path.stem]
            given += 1
    assert given == 1
    printed = capsys.readouterr().out
    if path.stem == "chat_and_heat_maps":
        assert "after layer 1: largest weight" in printed
        assert names["side_by_side"](names["maps"]).width == 3 * names["larger"].width
    else:
        assert "0 cannot be used" in printed
        assert "new image:" in printed
