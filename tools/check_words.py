"""Rejects retired words, and references to things that do not exist in the repository.

    python tools/check_words.py [FOLDER]

It reads every text file that git tracks in the folder (default: this repository), prints one line for each finding,
`file:line: what is wrong`, and exits with 1 if there is any. It needs nothing but Python and git.

Retired words are those of `docs/design/glossary.md` that are no ordinary English. References are links in Markdown,
mentions of Markdown files with or without an anchor, paths of source files, modules after `python -m`, numbered
sections and decisions (which must be anchors instead), and issues (which a reader of the repository does not have).
"""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

# These files name the words, or dead references, in order to reject them; the last one repeats files of the hub.
EXEMPT = ("docs/design/glossary.md", "tools/check_words.py", "tests/test_words.py", "tests/convert/released_files.py")
# Files that commands write and the text mentions; they are no part of the repository.
GENERATED = ("plan.md", "efficiency.md", "gpu.md", "tables.md", "real_charts.md")
# Their references are to pages of the site, which `mkdocs build --strict` checks.
SITE = ("mkdocs.yml", "tools/site_pages.py", "tests/test_site.py")
DATA = (".json", ".jsonl", ".svg")  # no references in these, only words

RETIRED = {  # each pattern matches its name
    "interlude": re.compile("interlude", re.IGNORECASE),
    "guide_mask": re.compile("guide_mask", re.IGNORECASE),
    "LlavaConfig": re.compile(r"\bLlavaConfig\b"),
    "ledger": re.compile("ledger", re.IGNORECASE),
    "claimed": re.compile(r"(?<!re)(?<!dis)(?<!pro)(?<!ex)(?<!ac)claimed", re.IGNORECASE),
    "whole_file": re.compile("whole_file", re.IGNORECASE),
    "undivided": re.compile("undivided", re.IGNORECASE),
    "picture": re.compile("picture", re.IGNORECASE),
}
STREAM = re.compile(r"\bStream\b")  # as a type only: a sentence may begin with it
RETIRED_TYPE = "retired type 'Stream' (docs/design/glossary.md)"

URL = re.compile(r"\b[a-z]+://[^\s)>\]\"'`]+")
CODE_SPAN = re.compile(r"`[^`]*`")
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
# Not behind `:`, `@` or a longer path: `repository@commit:README.md` is a file of another repository. Not a quoted name
# alone either, from which code makes a path.
MARKDOWN_FILE = re.compile(
    r"(?<![\w@:./~*-])(?!(?<=\")[\w.-]+\.md\")((?:\.{0,2}/)?(?:[\w.-]+/)*[\w-][\w.-]*\.md)\b(#[\w.-]+)?"
)
NUMBERED = re.compile(r"\.md`?\)?,?\s+(?:(?:section|trap|part|row)\s+)?\(?\d", re.IGNORECASE)
SOURCE_FILE = re.compile(
    r"(?<![\w@:./~*<{$-])((?:vr_jax|tests|benchmarks|configs|tools|docs)/[\w./-]*\w\.(?:py|sh|svg|json|jsonl|html|css|js))\b"
)
PLACEHOLDER = re.compile(r"[A-Z]{3}")  # as in configs/llava_vr_qwen2_SIZE.py
MODULE = re.compile(r"(?<!\w)python3? -m ((?:vr_jax|benchmarks)(?:\.\w+)*)")
DECISION = re.compile(r"\bdecisions?\s+#?\d", re.IGNORECASE)
ISSUE = re.compile(r"\b(?:issues?|pull requests?)\s+#?\d+\b", re.IGNORECASE)
OUTSIDE = re.compile(r"(?<![\w.])\.\./shared\b")

EXPLICIT_ANCHOR = re.compile(r"<a\s+(?:id|name)=\"([^\"]+)\"")
HEADING = re.compile(r"^#{1,6}\s+(.*?)\s*#*$")


def tracked_files(root: Path) -> list[str]:
    """The files that git tracks in a folder, as paths relative to it."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, check=True, capture_output=True, text=True)
    return [name for name in listed.stdout.split("\0") if name and (root / name).is_file()]


def check(root: Path, files: list[str]) -> list[str]:
    """Returns one line for each finding.

    Args:
        root: The folder of the repository.
        files: All files of the repository, as paths relative to it with forward slashes. References may point to
            any of them.
    """
    repository = _Repository(root, files)
    findings = []
    for name in files:
        text = repository.text(name)
        if text is not None and name not in EXEMPT:
            findings += [f"{name}:{line}: {what}" for line, what in sorted(set(_findings(repository, name, text)))]
    return findings


class _Repository:
    """The files of a repository, their texts, and the anchors of its pages."""

    def __init__(self, root: Path, files: list[str]):
        self.root = root
        self.files = frozenset(files)
        self.folders = frozenset(str(parent) for name in files for parent in PurePosixPath(name).parents)

    @functools.cache  # noqa: B019  # a repository lives as long as the program
    def text(self, name: str) -> str | None:
        """The text of a file, or None for a binary one."""
        try:
            return (self.root / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            return None

    @functools.cache  # noqa: B019
    def anchors(self, name: str) -> frozenset[str]:
        """The anchors of a Markdown page: explicit ones, and those that GitHub makes of headings."""
        found, seen = set(), dict[str, int]()
        for line in _without_code_blocks(self.text(name) or ""):
            found.update(EXPLICIT_ANCHOR.findall(line))
            if heading := HEADING.match(line):
                slug = _slug(heading.group(1))
                found.add(f"{slug}-{seen[slug]}" if slug in seen else slug)
                seen[slug] = seen.get(slug, 0) + 1
        return frozenset(found)

    def resolve(self, source: str, target: str) -> str | None:
        """The file or folder that `target`, written in the file `source`, means: relative to it or to the root."""
        for base in (PurePosixPath(source).parent, PurePosixPath()):
            path = _normal(base / target.strip("/"))
            if path is not None and (path in self.files or path in self.folders):
                return path
        return None

    def has_suffix(self, path: str) -> bool:
        """Whether a file's path ends with this one, as when a page about a package leaves its folder out."""
        return any(name.endswith("/" + path) for name in self.files)

    def has_module(self, dotted: str) -> bool:
        """Whether `python -m DOTTED` finds a module, or a package that can be run."""
        path = dotted.replace(".", "/")
        return f"{path}.py" in self.files or f"{path}/__main__.py" in self.files


def _findings(repository: _Repository, name: str, text: str) -> Iterator[tuple[int, str]]:
    """Line numbers and descriptions of what is wrong in one file."""
    for number, line in enumerate(text.splitlines(), 1):
        for word, pattern in RETIRED.items():
            if pattern.search(line):
                yield number, f"retired word {word!r} (docs/design/glossary.md)"
        if not name.endswith(DATA) and name not in SITE:
            for what in _references(repository, name, URL.sub("", line)):
                yield number, what
    if name.endswith(".md"):
        yield from _links(repository, name, text)
        for number, line in enumerate(text.splitlines(), 1):
            if any(STREAM.fullmatch(span.strip("`")) for span in CODE_SPAN.findall(line)):
                yield number, RETIRED_TYPE
    if name.endswith(".py") and STREAM.search(text):
        yield from _stream_types(text)


def _references(repository: _Repository, name: str, line: str) -> Iterator[str]:
    """What is wrong with the references of one line, links apart."""
    for found in ISSUE.finditer(line):
        yield f"reference to {found.group(0)!r}, which readers of the repository do not have"
    if OUTSIDE.search(line) and not name.startswith(("tests/", "benchmarks/")):
        yield "points outside the repository"
    for module in MODULE.findall(line):
        if not repository.has_module(module):
            yield f"python -m {module}: no such module"
    prose = LINK.sub("", line) if name.endswith(".md") else line
    if DECISION.search(prose):
        yield "decision given by its number: use an anchor, as in docs/design/decisions.md#decision-1"
    if NUMBERED.search(prose):
        yield "section given by its number: use an anchor, as in docs/design/methods.md#anyres"
        return
    for target, anchor in MARKDOWN_FILE.findall(prose):
        path = repository.resolve(name, target)
        if path is None:
            if target not in GENERATED:
                yield f"{target} does not exist"
        elif anchor and anchor[1:].rstrip(".") not in repository.anchors(path):
            yield f"{path} has no anchor {anchor.rstrip('.')}"
    for path in SOURCE_FILE.findall(prose):
        if PLACEHOLDER.search(path):
            continue
        if repository.resolve(name, path) is None and not repository.has_suffix(path):
            yield f"{path} does not exist"


def _links(repository: _Repository, name: str, text: str) -> Iterator[tuple[int, str]]:
    """Links of a Markdown page to files and anchors of the repository."""
    for number, line in enumerate(_without_code_blocks(text), 1):
        for target in LINK.findall(CODE_SPAN.sub("``", line)):
            if re.match(r"[a-z][a-z+.-]*:", target):
                continue
            path, _, anchor = target.partition("#")
            found = _normal(PurePosixPath(name).parent / path) if path else name
            if found is None or (found not in repository.files and found not in repository.folders):
                yield number, f"link to {target}: {path} does not exist"
            elif anchor and found.endswith(".md") and anchor not in repository.anchors(found):
                yield number, f"link to {target}: {found} has no anchor #{anchor}"


def _stream_types(text: str) -> Iterator[tuple[int, str]]:
    """Uses of the retired type name in Python code: classes, names, imports, and annotations that are strings."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        names = {
            ast.ClassDef: lambda n: [n.name],
            ast.Name: lambda n: [n.id],
            ast.Attribute: lambda n: [n.attr],
            ast.alias: lambda n: [n.name.rpartition(".")[2], n.asname],
        }.get(type(node), lambda n: [])(node)
        annotations = [getattr(node, "annotation", None), getattr(node, "returns", None)]
        strings = [a.value for a in annotations if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        if "Stream" in names or any(STREAM.search(string) for string in strings):
            yield node.lineno, RETIRED_TYPE


def _without_code_blocks(text: str) -> Iterator[str]:
    """The lines of a Markdown page, with those of fenced code blocks empty."""
    fenced = False
    for line in text.splitlines():
        fence = line.lstrip().startswith("```")
        yield "" if fenced or fence else line
        fenced ^= fence


def _slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def _normal(path: PurePosixPath) -> str | None:
    """A relative path without `.` and `..`, or None if it leaves the repository."""
    parts: list[str] = []
    for part in path.parts:
        if part == "..":
            if not parts:
                return None
            parts.pop()
        elif part != ".":
            parts.append(part)
    return "/".join(parts) or "."


def main() -> int:
    """Checks the folder of the command line; returns the exit status."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1]
    findings = check(root, tracked_files(root))
    print("\n".join(findings) if findings else "words and references: nothing found")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
