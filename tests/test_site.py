"""The pages read the same in the repository and on the site, which `make docs` builds (tools/site_pages.py)."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from tools import site_pages

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), *(ROOT / source for source in site_pages.OUTSIDE.values())]
ITEM = re.compile(r"^( *)(?:[*+-]|\d+\.) ")


def turned(page: str, markdown: str, *known: str) -> str:
    """A text of a page of the site, with its links turned, where the site has some other pages."""
    files = SimpleNamespace(get_file_from_path=lambda path: path if path in known else None)
    return site_pages.on_page_markdown(markdown, SimpleNamespace(file=SimpleNamespace(src_uri=page)), None, files)


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        ("index.md", "[a](docs/train.md#a-pod)", "[a](train.md#a-pod)"),
        ("index.md", "![a](docs/design/map.svg)", "![a](design/map.svg)"),
        ("benchmarks.md", "[a](../docs/train.md)", "[a](train.md)"),
        ("design/map.md", "[a](../../benchmarks/README.md)", "[a](../benchmarks.md)"),
        ("tutorials/one.md", "[a](../../CONTRIBUTING.md)", "[a](../contributing.md)"),
        ("tutorials/one.md", "[a](#here) [b](https://host/train.md)", "[a](#here) [b](https://host/train.md)"),
        ("index.md", "[a](docs/gone.md)", "[a](docs/gone.md)"),  # of which mkdocs warns
        ("benchmarks.md", "[accuracy](accuracy/__main__.py)", "accuracy"),
        ("index.md", "```\n[a](docs/train.md)\n```", "```\n[a](docs/train.md)\n```"),
    ],
)
def test_links_of_the_repository_become_links_of_the_site(page: str, link: str, expected: str):
    assert turned(page, link, "train.md", "design/map.svg", "benchmarks.md", "contributing.md") == expected


def test_the_reference_names_modules_that_exist():
    for modules in site_pages.REFERENCE.values():
        for name in modules:
            assert importlib.util.find_spec(name) is not None, name


def test_nothing_is_fetched_from_elsewhere():
    """The machines that build and read the site have no network."""
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert "font: false" in settings
    assert "http" not in settings


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    names = [str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")]
    assert [name for name in [*names, *site_pages.OUTSIDE] if f" {name}\n" not in navigation] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_lists_begin_behind_an_empty_line(page: Path):
    """GitHub takes a list directly below a line of text for a list, and the site takes it for more text."""
    fenced, before = False, ""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = line.lstrip().startswith("```")
        if not fenced and not fence and (item := ITEM.match(line)):
            assert not item.group(1), f"{page}:{number}: a list within a list needs four spaces on the site"
            below_text = before.strip() and not ITEM.match(before) and not before.startswith(" ")
            assert not below_text, f"{page}:{number}: put an empty line in front of the list"
        fenced ^= fence
        before = line
