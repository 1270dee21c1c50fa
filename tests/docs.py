"""Reads the code blocks of the documentation pages, so that tests can run them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"


def blocks(page: str, language: str) -> list[str]:
    """The text of every fenced code block of a page in a language, such as "python" or "console"."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[list[str]]:
    """The words of every `vr-jax` command of a page, without `vr-jax` and environment variables before it."""
    found = []
    for block in blocks(page, "console"):
        for line in block.splitlines():
            if "vr-jax " in line:
                words = shlex.split(line, comments=True)
                found.append(words[words.index("vr-jax") + 1 :])
    return found
