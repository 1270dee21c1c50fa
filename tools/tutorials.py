"""Runs the tutorials at a tiny size and compares what they print with what the pages show.

    python -m tools.tutorials docs/tutorials               compares; exits with 1 where something differs
    python -m tools.tutorials --write docs/tutorials       writes the new output into the pages

A page runs from top to bottom in an empty folder and in a process of its own, on CPUs. Its first lines may hold a
comment that says what it needs (`Needs`):

    <!-- tutorial: devices=8 files=models,data -->

Of its blocks, `console` and `python` run, a block with a title is written to the file of this name, and a `text` block
is the output of what ran before it. tools/code_blocks.py has the comments by which a block runs smaller than it reads.

Outputs are compared without what differs from one run or machine to another: times, sizes of files, and numbers with a
decimal point (`comparable`).
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import os
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tools import tiny_files
from tools.code_blocks import Block, console_lines, read_blocks, with_flags

ROOT = Path(__file__).resolve().parents[1]
NEEDS = re.compile(r"^<!-- tutorial:(.*) -->$", re.MULTILINE)
SHELL = ("cat", "cp", "head", "ls", "mkdir", "tail")  # the other commands that may run
SETS = {"TINY": tiny_files.TINY, "TINY_MODEL": tiny_files.TINY_MODEL}
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "VR_JAX_NO_CACHE": "1",
    "COLUMNS": "100",
    "TQDM_DISABLE": "1",
    "PYTHONPATH": str(ROOT),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
# Compiling tiny programs takes far longer than running them, optimised or not.
XLA_FLAGS = "--xla_backend_optimization_level=0"
PROGRESS = re.compile(r"\d%\|")  # a progress bar
UNITS = "ms|s|GiB|MiB|GB|MB|kB|minutes|days|hours|%"
VARYING = (
    (re.compile(r"\d+:\d\d:\d\d"), "TIME"),
    (re.compile(rf"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)? ?(?:{UNITS})(?!\w)"), "NUMBER"),
    (re.compile(r"\d[\d,]*\.\d+(?:e[+-]?\d+|\.\d+)*|\d+e[+-]?\d+"), "NUMBER"),
)


class Failed(Exception):
    """A command of a page failed, or the page cannot be understood. The message names the line."""


@dataclass(frozen=True)
class Needs:
    """What a page needs to run.

    Attributes:
        devices: The number of simulated devices.
        files: What is there at the beginning: "models", "data" or "checkpoints" (tools/tiny_files.py).
    """

    devices: int = 1
    files: tuple[str, ...] = ()

    @classmethod
    def of(cls, page: str) -> Needs:
        """Reads the comment of a page."""
        if not (found := NEEDS.search(page)):
            return cls()
        fields = dict(field.split("=") for field in found.group(1).split())
        return cls(int(fields.pop("devices", 1)), tuple(filter(None, fields.pop("files", "").split(","))), **fields)


def run_page(page: str) -> str:
    """Runs the blocks of a page in the current folder; returns the page with the outputs that they gave.

    Raises:
        Failed: A block failed.
    """
    written = page.splitlines(keepends=True)
    output: str | None = None
    replaced: list[tuple[Block, str]] = []
    for block in read_blocks(page):
        if any(text.startswith("skip") for text in block.directives):
            output = None
        elif block.title:
            Path(block.title).write_text(_rewritten(block), encoding="utf-8")
        elif block.language in ("console", "python"):
            output = _run(block)
        elif block.language == "text" and output is not None:
            replaced.append((block, _shown(output, block.arguments("show"))))
            output = None
    for block, text in reversed(replaced):
        end = block.line + block.text.count("\n")
        if comparable(text) != comparable(block.text):
            written[block.line : end] = [text]
    return "".join(written)


def comparable(text: str) -> str:
    """A text without what differs from run to run; runs of spaces count as one, because columns follow the numbers.

    A training logs a step every so many seconds, so a slow machine shows more of them, or more `...` where a page
    leaves them out; only the last step counts.
    """
    text = "".join(line for line in text.splitlines(keepends=True) if not (_is_progress(line) or line == "...\n"))
    for pattern, name in VARYING:
        text = pattern.sub(name, text)
    return "\n".join(re.sub(r"[ \t]+", " ", line).rstrip() for line in text.splitlines())


def _is_progress(line: str) -> bool:
    found = re.search(r" step (\d+) of (\d+): ", line)
    return found is not None and found[1] != found[2]


def _rewritten(block: Block) -> str:
    text = block.text
    for rule in block.arguments("write"):
        new, _, old = rule.partition(" for ")
        if not old or old not in text:
            raise Failed(f"line {block.line}: {old!r} is not in the block")
        text = text.replace(old, new)
    return text


def _run(block: Block) -> str:
    """Runs a block and returns what it prints, standard error included."""
    text = _rewritten(block)
    if block.language == "python":
        return _in_process(block, lambda: exec(compile(text, f"line {block.line}", "exec"), {"__name__": "__main__"}))
    flags = [flag for given in block.arguments("add") for flag in _flags(given)]
    dropped = {flag for given in block.arguments("drop") for flag in given.split()}
    lines = ([word for word in words if word not in dropped] for words in console_lines(text))
    return "".join(_command(block, words, flags) for words in lines)


def _flags(given: str) -> Iterator[str]:
    """The flags of a comment, in which TINY and TINY_MODEL stand for those of tools/tiny_files.py."""
    for word in given.split():
        yield from tiny_files.flags_of(SETS[word]) if word in SETS else (word,)


def _command(block: Block, words: list[str], flags: list[str]) -> str:
    if words[0] == "vr-jax":
        words = with_flags(words, flags)
        if words[1] == "plan":  # It sets up its compilers, which only a new process can do.
            return _subprocess(block, [sys.executable, "-m", "vr_jax", *words[1:]])
        from vr_jax.cli.main import main

        return _in_process(block, lambda: main(words[1:]))
    if words[:2] == ["python", "-c"]:
        return _in_process(block, lambda: exec(words[2], {"__name__": "__main__"}))
    if words[0] == "python" and words[1].endswith(".py"):
        return _in_process(block, lambda: _program(with_flags(words[1:], flags)))
    if words[0] == "python":
        return _subprocess(block, [sys.executable, *with_flags(words[1:], flags)])
    if words[0] in SHELL:
        return _subprocess(block, words)
    raise Failed(f"line {block.line}: {words[0]!r} is none of the commands that run here; skip the block")


def _program(words: list[str]) -> None:
    """Runs a file of Python as `python FILE ARGUMENTS` does."""
    before = sys.argv
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    finally:
        sys.argv = before


def _in_process(block: Block, call: Callable[[], int | None]) -> str:
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            status = call()
    except SystemExit as end:
        status = end.code
    except Exception as error:
        raise Failed(f"line {block.line}: {type(error).__name__}: {error}\n{printed.getvalue()}") from error
    return _checked(block, status, printed.getvalue())


def _subprocess(block: Block, words: Sequence[str]) -> str:
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return _checked(block, done.returncode, done.stdout)


def _checked(block: Block, status: int | str | None, printed: str) -> str:
    printed = "\n".join(line.rpartition("\r")[2] for line in printed.split("\n") if not PROGRESS.search(line))
    printed = printed.replace(str(Path.cwd()) + "/", "").replace(str(ROOT) + "/", "")
    wanted = int("".join(block.arguments("exit")) or 0)
    if (status or 0) != wanted:
        raise Failed(f"line {block.line}: exit status {status}, expected {wanted}\n{printed}")
    return printed


def _shown(output: str, patterns: Sequence[str]) -> str:
    """The lines of an output that a page shows, with `...` for those that it leaves out."""
    lines: list[str] = []
    for line in output.splitlines():
        if not patterns or any(re.search(pattern, line) for pattern in patterns):
            lines.append(line.rstrip())
        elif not lines or lines[-1] != "...":
            lines.append("...")
    return "".join(f"{line}\n" for line in lines)


def _run_here(path: Path) -> str:
    """Runs a page in an empty folder and returns the new text."""
    page = path.read_text(encoding="utf-8")
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for name in Needs.of(page).files:
                getattr(tiny_files, f"write_{name}")(Path(folder))
            return run_page(page)
        finally:
            os.chdir(before)


def check(path: Path, *, write: bool = False) -> list[str]:
    """Runs a page in a process of its own.

    Args:
        path: The page.
        write: Whether the page gets the outputs that differ.

    Returns:
        What differs or failed, as lines; none where all is well.
    """
    needs = Needs.of(path.read_text(encoding="utf-8"))
    flags = f"{XLA_FLAGS} --xla_force_host_platform_device_count={needs.devices}"
    command = [sys.executable, "-m", "tools.tutorials", "--here", *(["--write"] if write else []), str(path.resolve())]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, "XLA_FLAGS": flags},
        capture_output=True,  # Compilers write warnings of their own to standard error.
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return []
    return done.stdout.splitlines() if done.returncode == 1 and done.stdout else [f"{path}: {done.stderr}"]


def main(arguments: list[str] | None = None) -> int:
    """Runs the pages of the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="+", type=Path, metavar="PAGE", help="pages, or folders of pages")
    parser.add_argument("--write", action="store_true", help="write the outputs that differ into the pages")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    pages = [page for path in options.pages for page in (sorted(path.glob("*.md")) if path.is_dir() else [path])]
    if options.here:
        found = _compare(pages[0], options.write)
        print("\n".join(found))
        return 1 if found else 0
    # The pages share what they compile.
    with tempfile.TemporaryDirectory() as compiled, ThreadPoolExecutor(os.cpu_count()) as pool:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", compiled)
        results = pool.map(lambda path: check(path, write=options.write), pages)
        failed = 0
        for path, found in zip(pages, results, strict=True):
            print("\n".join([f"{path}: {'failed' if found else 'as shown'}", *found]), flush=True)
            failed += bool(found)
    print(f"{len(pages) - failed} passed, {failed} failed")
    return 1 if failed else 0


def _compare(path: Path, write: bool) -> list[str]:
    """Runs a page in this process; returns the differences, or writes them."""
    before = path.read_text(encoding="utf-8")
    try:
        after = _run_here(path)
    except Failed as failure:
        return [f"{path}: {failure}"]
    if write and after != before:
        path.write_text(after, encoding="utf-8")
        return []
    lines = difflib.unified_diff(
        before.splitlines(), after.splitlines(), f"{path.name} shows", "it printed", lineterm=""
    )
    return list(lines)


if __name__ == "__main__":
    sys.exit(main())
