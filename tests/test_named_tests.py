"""The tests that the pages of docs name exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMED = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")
PAGES = [path for path in sorted((ROOT / "docs").rglob("*.md")) if NAMED.search(path.read_text())]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_named_test_exists(page):
    for file, name in NAMED.findall(page.read_text()):
        assert (ROOT / file).is_file(), file
        if name:
            assert f"def {name}(" in (ROOT / file).read_text(), f"{file}::{name}"
