"""The tutorials run as they are written, at a tiny size, and print what they show (tools/tutorials.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs import DOCS, check_command
from tools import tutorials
from tools.code_blocks import Block, console_lines, read_blocks, with_flags

PAGES = {path.stem: path for path in sorted((DOCS / "tutorials").glob("*.md")) if path.stem != "index"}
# Commands whose config names a method or reads a model directory that only the page itself makes.
OF_THE_PAGE = ("max_pool", "my_vlm.py")


def text_of(page: str) -> str:
    return PAGES[page].read_text(encoding="utf-8")


@pytest.mark.slow  # each page compiles several programs; a job of CI runs them all by `make tutorials`
@pytest.mark.parametrize("page", PAGES)
def test_the_page_shows_what_its_commands_print(page: str):
    pytest.importorskip("torch", reason="tiny Hugging Face models are made with torch")
    assert tutorials.check(PAGES[page]) == []


@pytest.mark.parametrize("page", PAGES)
def test_commands_have_flags_and_configs_that_exist(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    found = 0
    for block in read_blocks(text_of(page)):
        if block.title:
            (tmp_path / block.title).write_text(block.text)
        for words in console_lines(block.text) if block.language == "console" else []:
            if words[0] == "vr-jax" and not any(name in " ".join(words) for name in OF_THE_PAGE):
                check_command(words[1:])
                found += 1
    assert found or page == "add_method"


@pytest.mark.parametrize("page", PAGES)
def test_a_page_says_what_is_needed_and_what_to_do_when_it_fails(page: str):
    text = text_of(page)
    assert "| you need | it takes |" in text
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings[-1] == "## When it fails"
    assert f"]({page}.md)" in (DOCS / "tutorials" / "index.md").read_text(encoding="utf-8")


PAGE = """# A page

<!-- tests: write 3 for 3000 -->

```python
for number in range(3000):
    print("line", number, number / 7)
```

<!-- tests: show line [02] -->

```text
line 0 0.0
...
line 2 0.2857
```

```console
mkdir folder
ls
```

```text
folder
```

<!-- tests: skip, it needs a TPU -->

```console
gcloud --version
```
"""


def test_a_page_that_shows_what_is_printed_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Decimals may differ, since machines differ in them."""
    monkeypatch.chdir(tmp_path)
    assert tutorials.run_page(PAGE) == PAGE


@pytest.mark.parametrize(
    ("shown", "wrong"), [("line 0", "line 1"), ("...\n", ""), ("```text\nfolder", "```text\nanother")]
)
def test_another_output_is_found_and_put_in(shown: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    changed = PAGE.replace(shown, wrong)
    assert changed != PAGE
    assert tutorials.comparable(tutorials.run_page(changed)) == tutorials.comparable(PAGE)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("```console\nvr-jax experiments --no_such_flag\n```", "line 1: exit status 2"),
        ("```console\ngcloud --version\n```", "line 1: 'gcloud' is none of the commands"),
        ("\n```python\nraise ValueError('no')\n```", "line 2: ValueError: no"),
        ("<!-- tests: write 1 for 2 -->\n```python\nprint(3)\n```", "line 2: '2' is not in the block"),
    ],
)
def test_what_fails_is_named_with_its_line(block: str, message: str, tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(tutorials.Failed, match=message):
        tutorials.run_page(block)


def test_a_check_in_a_process_of_its_own_names_the_difference(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("```python\nprint('right')\n```\n\n```text\nwrong\n```\n")
    assert {"-wrong", "+right"} <= set(tutorials.check(page))
    assert tutorials.check(page, write=True) == []
    assert "```text\nright\n```" in page.read_text()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("09:30:01 I step 2: loss 6.2, 1.1 samples/s", "10:31:02 I step 2: loss 6.317, 14.3 samples/s"),
        ("written in 12 s, 0.8 MB", "written in 1.5 s, 1 MB"),
        ("I step 1 of 2: loss 6.2\nI step 2 of 2: loss 6.1", "I step 2 of 2: loss 6.3"),
        ("first\n...\nI step 2 of 2: loss 6.1", "first\nI step 2 of 2: loss 6.1"),
    ],
)
def test_times_sizes_and_decimals_are_not_compared(one: str, other: str):
    assert tutorials.comparable(one) == tutorials.comparable(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [("12 records", "13 records"), ("loss 6.2", "score 6.2"), ("a\nb", "a"), ("I step 2 of 2: loss 6.1", "")],
)
def test_everything_else_is_compared(one: str, other: str):
    assert tutorials.comparable(one) != tutorials.comparable(other)


def test_blocks_know_their_comments_titles_and_lines():
    page = 'a\n<!-- tests: add --x=1 -->\n<!-- tests: drop --y -->\n\n```console title="f.sh"\nb \\\n  c "d\ne"\n```\n'
    assert read_blocks(page) == [Block("console", 'b \\\n  c "d\ne"\n', 5, "f.sh", ("add --x=1", "drop --y"))]
    assert console_lines(read_blocks(page)[0].text) == [["b", "c", "d\ne"]]
    assert console_lines("A=1 B=2 run it  # a comment\n\n") == [["run", "it"]]


def test_flags_replace_those_of_the_same_name():
    assert with_flags(["vr-jax", "--a=1", "--b"], ["--a=2", "--c=3"]) == ["vr-jax", "--a=2", "--b", "--c=3"]


def test_a_comment_without_a_meaning_is_refused():
    with pytest.raises(ValueError, match="line 2: 'tests: ad' means nothing; expected add, drop, write, show, skip"):
        read_blocks("text\n<!-- tests: ad --limit=2 -->\n")
