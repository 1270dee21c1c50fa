"""Reads the fenced code blocks of Markdown pages, and the commands in them, so that tests can run what pages show.

A comment above a block says what is different where it runs small. The reader of the page does not see it:

    <!-- tests: add --config.steps=2 -->       a flag that replaces the flag of this name, or is added, in each command
    <!-- tests: drop --distributed -->         a flag that is left out
    <!-- tests: write 12 for 20000 -->         another text
    <!-- tests: show loss|accuracy -->         above an output: only the lines that match; `...` stands for the others
    <!-- tests: skip, it needs a TPU -->       the block does not run; its commands are checked all the same
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

FENCE = re.compile(r"^```(\w*)(.*)$")
DIRECTIVE = re.compile(r"^<!-- tests: (.*) -->$")
WORDS = ("add", "drop", "write", "show", "skip")
TITLE = re.compile(r"title=\"([^\"]+)\"")


@dataclass(frozen=True)
class Block:
    """A fenced code block.

    Attributes:
        language: Its language, such as "python", "console" or "text".
        text: Its lines, each with its end.
        line: The number of the line with the opening fence, counted from 1.
        title: The name of the file that the block shows, or an empty text.
        directives: What the comments above it say, see the module.
    """

    language: str
    text: str
    line: int
    title: str = ""
    directives: tuple[str, ...] = ()

    def arguments(self, word: str) -> list[str]:
        """What follows a word, such as "add", in the comments that begin with it."""
        return [text[len(word) :].strip(" ,") for text in self.directives if text.split(",")[0].split()[0] == word]


def read_blocks(page: str) -> list[Block]:
    """The blocks of the text of a page in their order.

    Raises:
        ValueError: A comment for the tests begins with a word that has no meaning.
    """
    found: list[Block] = []
    directives: list[str] = []
    lines = iter(enumerate(page.splitlines(), 1))
    for number, line in lines:
        if directive := DIRECTIVE.match(line):
            if (word := re.split(r"[ ,]", directive.group(1))[0]) not in WORDS:
                raise ValueError(f"line {number}: 'tests: {word}' means nothing; expected {', '.join(WORDS)}")
            directives.append(directive.group(1))
        elif fence := FENCE.match(line):
            inside = "".join(f"{text}\n" for text in _until_fence(lines))
            title = TITLE.search(fence.group(2))
            found.append(Block(fence.group(1), inside, number, title.group(1) if title else "", tuple(directives)))
            directives = []
        elif line.strip():
            directives = []
    return found


def _until_fence(lines: Iterator[tuple[int, str]]) -> Iterator[str]:
    for _, line in lines:
        if line.startswith("```"):
            return
        yield line


def console_lines(text: str) -> list[list[str]]:
    """The words of every command of a console block, without comments and without environment variables before it."""
    found = []
    for line in _logical_lines(text):
        words = shlex.split(line, comments=True)
        while words and re.match(r"^[A-Z_]+=", words[0]):
            words.pop(0)
        if words:
            found.append(words)
    return found


def _logical_lines(text: str) -> Iterator[str]:
    """Lines that a backslash or an open quotation mark continues are one."""
    waiting = ""
    for line in text.splitlines():
        waiting += line
        if waiting.endswith("\\"):
            waiting = waiting[:-1]
        elif waiting.count('"') % 2:
            waiting += "\n"
        else:
            yield waiting
            waiting = ""
    if waiting.strip():
        yield waiting


def with_flags(words: list[str], flags: list[str]) -> list[str]:
    """A command with flags that replace those of the same name; others are added at the end."""
    result = list(words)
    for flag in flags:
        name = flag.partition("=")[0]
        places = [i for i, word in enumerate(result) if word.partition("=")[0] == name]
        if places:
            result[places[0]] = flag
        else:
            result.append(flag)
    return result
