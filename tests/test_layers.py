"""The layers of the package hold: who may import whom, no cycles, and no dynamic import where none is needed.

import-linter checks the contracts of pyproject.toml. The rest is checked here from the syntax trees: cycles between
single modules, imports of a client's inner modules, and dynamic imports, which import-linter cannot see.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "vr_jax"

# A client, and the other clients that it may use.
CLIENTS = {
    "app": ("inference", "evaluation"),
    "demo": ("training", "inference", "evaluation"),
    "inference": (),
    "evaluation": ("inference",),
    "training": ("evaluation", "convert"),  # a run with LoRA writes its adapter in the form of PEFT
    "convert": (),
    "plan": ("training", "inference", "evaluation"),
    "probe": ("training", "inference", "evaluation"),
    "efficiency": ("training", "inference", "evaluation"),
}
# The only places that may import a module by a name computed at run time, and the function if not the whole module.
DYNAMIC = {
    "vr_jax": None,  # `import vr_jax` offers its names lazily
    "vr_jax.model.registry": "discover",  # the method files
    "vr_jax.settings.config_files": None,  # the user's own config file, which is no module of ours
    "vr_jax.demo.worker": "run",  # command lines of the program, run as Python does
}
DYNAMIC_NAMES = (
    *("__import__", "exec", "import_module", "reload"),
    *("spec_from_file_location", "module_from_spec", "exec_module", "load_module", "LazyLoader"),
)


@dataclass(frozen=True)
class Import:
    """One import statement: who imports which module, and where."""

    source: str
    target: str
    line: int


def modules_of(root: Path, package: str) -> dict[str, Path]:
    """The file of every module of a package by its dotted name; a package's name stands for its `__init__`."""
    found = {}
    for path in sorted((root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(module: str, path: Path, modules: dict[str, Path]) -> Iterator[Import]:
    """The imports of modules of the package, those within functions among them, those for type checkers not."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in _run_time_nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in modules:
                    yield Import(module, alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base]).rstrip(".")
            for alias in node.names:
                target = f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base
                if target in modules:
                    yield Import(module, target, node.lineno)


def _run_time_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes of a syntax tree, except what stands under `if TYPE_CHECKING`."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from _run_time_nodes(other)
        else:
            yield from _run_time_nodes(child)


def all_imports(root: Path = ROOT, package: str = PACKAGE) -> list[Import]:
    """Every import of a module of the package by another one."""
    modules = modules_of(root, package)
    return [one for module, path in modules.items() for one in imports_of(module, path, modules)]


def cycles(imports: list[Import]) -> list[list[str]]:
    """The groups of modules that import each other in a circle."""
    graph: dict[str, set[str]] = {}
    for one in imports:
        graph.setdefault(one.source, set()).add(one.target)
        graph.setdefault(one.target, set())

    def reachable(start: str) -> set[str]:
        seen, waiting = set[str](), list(graph[start])
        while waiting:
            module = waiting.pop()
            if module not in seen:
                seen.add(module)
                waiting.extend(graph[module])
        return seen

    reach = {module: reachable(module) for module in graph}
    groups = {tuple(sorted(m for m in reach[start] if start in reach[m])) for start in graph if start in reach[start]}
    return [list(group) for group in sorted(groups)]


def client_violations(imports: list[Import]) -> list[str]:
    """Imports of a client that the pair is not allowed, or that reach past the client's `__init__`.

    The commands in `cli` and the lazy names of `vr_jax` stand above the clients and may use all of them.
    """
    found = []
    for one in imports:
        source, target = one.source.split(".")[1:2], one.target.split(".")[1:2]
        if not target or target[0] not in CLIENTS or source == target:
            continue
        if not source or source[0] in ("__main__", "cli"):
            continue
        if target[0] not in CLIENTS.get(source[0], ()):
            found.append(f"{one.source}:{one.line} imports {one.target}: this pair is not allowed")
        elif one.target.count(".") > 1:
            found.append(f"{one.source}:{one.line} imports {one.target}: use the package's own names")
    return found


def dynamic_imports(module: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and enclosing function of everything that imports modules by name at run time."""

    def visit(node: ast.AST, function: str) -> Iterator[tuple[int, str]]:
        if isinstance(node, ast.FunctionDef):
            function = function or node.name
        names = {
            ast.Import: lambda n: [alias.name for alias in n.names],
            ast.ImportFrom: lambda n: [f"{n.module}.{alias.name}" for alias in n.names],
            ast.Attribute: lambda n: [ast.unparse(n)],
            ast.Name: lambda n: [n.id],
        }.get(type(node), lambda n: [])(node)
        if any(_is_dynamic(name) for name in names):
            yield node.lineno, function
        for child in ast.iter_child_nodes(node):
            yield from visit(child, function)

    yield from visit(tree, "")


def _is_dynamic(name: str) -> bool:
    """Whether a dotted name is one of Python's ways to import by a computed name; `find_spec` only looks."""
    parts = name.split(".")
    return parts[0] in ("pkgutil", "runpy", "imp") or parts[-1] in DYNAMIC_NAMES


def dynamic_violations(root: Path = ROOT, package: str = PACKAGE) -> list[str]:
    """Dynamic imports outside the places that may have them."""
    found = []
    for module, path in modules_of(root, package).items():
        if module.startswith(f"{package}.cli"):
            continue
        for line, function in dynamic_imports(module, ast.parse(path.read_text(encoding="utf-8"))):
            if module not in DYNAMIC or (DYNAMIC[module] is not None and function not in ("", DYNAMIC[module])):
                found.append(f"{module}:{line} imports by a computed name")
    return found


def test_the_contracts_of_pyproject_hold():
    pytest.importorskip("importlinter", reason="import-linter is part of the extra 'lint'")
    program = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout[result.stdout.find("Contracts") :]


def test_no_modules_import_each_other():
    assert cycles(all_imports()) == []


def test_clients_use_each_other_through_their_packages():
    assert client_violations(all_imports()) == []


def test_only_named_places_import_dynamically():
    assert dynamic_violations() == []


def package_in(folder: Path, files: dict[str, str]) -> Path:
    """Writes a small package `vr_jax` with these modules."""
    for name, text in {"__init__.py": "", **files}.items():
        path = folder / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.mark.parametrize(
    ("files", "cycle"),
    [
        ({"a.py": "import vr_jax.b", "b.py": "from vr_jax import a"}, ["vr_jax.a", "vr_jax.b"]),
        ({"a.py": "from vr_jax.b import x", "b.py": "def f():\n    from vr_jax.a import y"}, ["vr_jax.a", "vr_jax.b"]),
        ({"p/__init__.py": "from .m import x", "p/m.py": "from vr_jax.p import y"}, ["vr_jax.p", "vr_jax.p.m"]),
    ],
    ids=["modules", "within a function", "a package and its module"],
)
def test_cycles_are_found(tmp_path: Path, files: dict[str, str], cycle: list[str]):
    assert cycles(all_imports(package_in(tmp_path, files))) == [cycle]


def test_imports_for_type_checkers_are_no_cycle(tmp_path: Path):
    files = {"a.py": "import vr_jax.b", "b.py": "if TYPE_CHECKING:\n    import vr_jax.a"}
    assert cycles(all_imports(package_in(tmp_path, files))) == []


@pytest.mark.parametrize(
    ("name", "line", "allowed"),
    [
        ("evaluation/run.py", "from vr_jax.inference import Generator", True),
        ("evaluation/run.py", "from vr_jax.inference.generate import Generator", False),
        ("inference/run.py", "from vr_jax.evaluation import evaluate", False),
        ("training/run.py", "from vr_jax.inference import Generator", False),
        ("model/run.py", "from vr_jax.training import train", False),
        ("cli/run.py", "from vr_jax.probe.head import Head", True),
        ("probe/run.py", "from vr_jax.probe.head import Head", True),
    ],
)
def test_use_of_clients_is_checked(tmp_path: Path, name: str, line: str, allowed: bool):
    modules = ("inference/generate.py", "inference/__init__.py", "evaluation/__init__.py", "training/__init__.py")
    others = dict.fromkeys((*modules, "probe/__init__.py", "probe/head.py"), "")
    assert (client_violations(all_imports(package_in(tmp_path, {**others, name: line}))) == []) == allowed


@pytest.mark.parametrize(
    ("name", "code", "allowed"),
    [
        ("data/x.py", "import importlib\nimportlib.import_module(name)", False),
        ("data/x.py", "from importlib import import_module", False),
        ("data/x.py", "import pkgutil", False),
        ("data/x.py", "__import__(name)", False),
        ("data/x.py", "import importlib as i\ni.util.spec_from_file_location(name, path)", False),
        ("data/x.py", "import importlib.util\nimportlib.util.find_spec(name)", True),
        ("data/x.py", "import importlib.resources\nimportlib.resources.files(name)", True),
        ("model/registry.py", "def discover():\n    import importlib\n    importlib.import_module(name)", True),
        ("model/registry.py", "def other():\n    import importlib\n    importlib.import_module(name)", False),
        ("cli/main.py", "import importlib\nimportlib.import_module(name)", True),
    ],
)
def test_dynamic_imports_are_found(tmp_path: Path, name: str, code: str, allowed: bool):
    assert (dynamic_violations(package_in(tmp_path, {name: code})) == []) == allowed
