"""Retired words and dead references are found, each kind of them, and the repository has none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools import check_words

ROOT = Path(__file__).resolve().parents[1]

PAGE = """# Title

<a id="explicit"></a>
## A `heading`, twice

## A `heading`, twice
"""
REPOSITORY = {
    "docs/page.md": PAGE,
    "README.md": "",
    "vr_jax/__init__.py": "",
    "vr_jax/model/pool.py": "",
    "vr_jax/tool/__main__.py": "",
}


def findings_in(folder: Path, name: str, text: str) -> list[str]:
    """What the checker finds in a small repository with one more file."""
    for path, content in {**REPOSITORY, name: text}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content)
    return check_words.check(folder, [*REPOSITORY, name])


@pytest.mark.parametrize("word", check_words.RETIRED)
@pytest.mark.parametrize("name", ["vr_jax/new.py", "docs/new.md", "configs/new.toml", "docs/new.svg"])
def test_retired_words_are_found(tmp_path: Path, word: str, name: str):
    [finding] = findings_in(tmp_path, name, f"first line\n# a {word} b\n")
    assert finding.startswith(f"{name}:2: ")
    assert word in finding


STREAM = "Stre" + "am"


@pytest.mark.parametrize(
    "code",
    [
        f"class {STREAM}:\n    pass\n",
        f"def f(x: {STREAM}): ...\n",
        f"def f() -> 'list[{STREAM}]': ...\n",
        f"from vr_jax.model import {STREAM}\n",
        f"x = model.{STREAM}()\n",
    ],
)
def test_the_retired_type_is_found_in_code(tmp_path: Path, code: str):
    assert "retired type" in findings_in(tmp_path, "vr_jax/new.py", code)[0]


def test_the_retired_type_is_found_in_pages(tmp_path: Path):
    assert "retired type" in findings_in(tmp_path, "docs/new.md", f"maps a `{STREAM}` to the next\n")[0]


@pytest.mark.parametrize("code", [f"# {STREAM} of samples.\n", f"class Text{STREAM}: ...\n", "stream = open(name)\n"])
def test_other_streams_are_allowed(tmp_path: Path, code: str):
    assert findings_in(tmp_path, "vr_jax/new.py", code) == []


DEAD = {
    "link to a file": ("docs/new.md", "see [a page](gone.md)"),
    "link out of the repository": ("docs/new.md", "see [a page](../../README.md)"),
    "link to an anchor of another page": ("docs/new.md", "see [a part](page.md#gone)"),
    "link to an anchor of the same page": ("docs/new.md", "see [a part](#gone)"),
    "image": ("docs/new.md", "![a plot](gone.svg)"),
    "Markdown file in a comment": ("vr_jax/new.py", "x = 1  # as docs/gone.md says"),
    "Markdown file in a docstring": ("vr_jax/new.py", '"""See methods.md."""'),
    "anchor in a comment": ("vr_jax/new.py", "# docs/page.md#gone"),
    "source file": ("docs/new.md", "`vr_jax/model/gone.py` holds it"),
    "module": ("docs/new.md", "python -m vr_jax.gone --help"),
    "package without a main module": ("docs/new.md", "python -m vr_jax.model"),
    "section by number": ("vr_jax/new.py", "# docs/page.md 5.4"),
    "trap by number": ("configs/new.toml", "# must be PIL's (docs/page.md, trap 4)"),
    "decision by number": ("vr_jax/new.py", '"""Folded away (design decision 3)."""'),
    "issue by number": ("docs/new.md", "the goals of issue 5"),
    "issue with a hash": ("vr_jax/new.py", "# pull request #12"),
    "folder beside the repository": ("docs/new.md", "`../shared/data` holds them"),
}


@pytest.mark.parametrize("kind", DEAD)
def test_dead_references_are_found(tmp_path: Path, kind: str):
    name, line = DEAD[kind]
    [finding] = findings_in(tmp_path, name, f"\n{line}\n")
    assert finding.startswith(f"{name}:2: ")


LIVE = {
    "links": (
        "docs/new.md",
        "[a](page.md) [b](page.md#explicit) [c](../README.md) [d](../vr_jax/) [e](#here)\n\n# Here",
    ),
    "heading twice": ("docs/new.md", "[a](page.md#a-heading-twice) [b](page.md#a-heading-twice-1)"),
    "link text with a number": ("docs/new.md", "[decision 7](page.md#explicit)"),
    "web address": ("docs/new.md", "[a](https://host/README.md#x) <https://host/issues/12> mailto:a@b.c"),
    "code block": ("docs/new.md", "```\n[a](gone)\n```"),
    "comment": ("vr_jax/new.py", "# docs/page.md#explicit, vr_jax/model/pool.py; python -m vr_jax.tool"),
    "other repository": ("vr_jax/new.py", "# DeCo@103416e:docs/README.md, LLaVA:llava/model/builder.py"),
    "written by a command": ("vr_jax/new.py", f"# also writes {check_words.GENERATED[0]}"),
    "path made by code": ("vr_jax/new.py", 'PAGE = ROOT / "docs" / "other.md"'),
    "the paper's section": ("vr_jax/new.py", "# paper, section 3.3"),
}


@pytest.mark.parametrize("kind", LIVE)
def test_live_references_are_allowed(tmp_path: Path, kind: str):
    name, text = LIVE[kind]
    assert findings_in(tmp_path, name, f"{text}\n") == []


def test_the_glossary_may_name_retired_words(tmp_path: Path):
    text = " ".join(check_words.RETIRED)
    assert findings_in(tmp_path, "docs/design/glossary.md", text) == []


def test_binary_files_are_skipped(tmp_path: Path):
    assert findings_in(tmp_path, "README.md", "") == []
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff")
    assert check_words.check(tmp_path, ["image.png"]) == []


def test_the_command_names_each_finding_and_fails(tmp_path: Path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / "page.md").write_text("fine\n[a](gone.md)\n")
    subprocess.run(["git", "add", "page.md"], cwd=tmp_path, check=True)
    command = [sys.executable, str(ROOT / "tools" / "check_words.py"), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "page.md:2: link to gone.md: gone.md does not exist\n")
    (tmp_path / "page.md").write_text("fine\n")
    assert subprocess.run(command, capture_output=True, text=True).returncode == 0


def test_the_repository_has_none():
    assert check_words.check(ROOT, check_words.tracked_files(ROOT)) == []
