"""The table of benchmarks/README.md lists every script, with a command that the script accepts."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "benchmarks" / "README.md"
STARTED_BY_ANOTHER = {"benchmarks.speed.generation_sides"}  # The page says which script starts it.


def scripts() -> dict[str, Path]:
    """The files below benchmarks/ that run when they are started, by the name after `python -m`."""
    found = {}
    for path in sorted((ROOT / "benchmarks").rglob("*.py")):
        tests = [node.test for node in ast.parse(path.read_text()).body if isinstance(node, ast.If)]
        if any(ast.unparse(test) == "__name__ == '__main__'" for test in tests):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
            found[module] = path
    return found


def rows() -> dict[str, tuple[str, list[str]]]:
    """The link and the command's words of each row of the table, by the name of the module."""
    pattern = re.compile(r"^\| \[([\w.]+)\]\(([\w./]+)\) \|(?:[^|]+\|){3} `([^`]+)` \|$", re.MULTILINE)
    found = pattern.findall(README.read_text(encoding="utf-8"))
    return {f"benchmarks.{name}": (link, shlex.split(command)) for name, link, command in found}


def test_every_script_has_a_row():
    assert set(rows()) == set(scripts()) - STARTED_BY_ANOTHER
    for module, (link, command) in rows().items():
        assert (README.parent / link) == scripts()[module]
        assert command[:3] == ["python", "-m", module]
    assert all(module in README.read_text(encoding="utf-8") for module in STARTED_BY_ANOTHER)


@pytest.mark.parametrize("module", rows())
def test_the_command_of_a_row_is_accepted(module):
    path = scripts()[module].relative_to(ROOT).with_suffix("")
    parser = importlib.import_module(".".join(path.parts)).parser()
    flags = rows()[module][1][3:]
    options = vars(parser.parse_args(flags))
    given = {flag.removeprefix("--").partition("=")[0] for flag in flags if flag.startswith("--")}
    assert given <= set(options)
