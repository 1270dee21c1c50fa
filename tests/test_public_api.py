"""The names of `import vr_jax`, what importing costs, and the example in Python of docs/first_steps.md."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vr_jax
from tests.inference import tiny

ROOT = Path(__file__).parents[1]


def in_new_process(program: str) -> str:
    """The standard output of a Python program in a process of its own."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", vr_jax.__all__)
def test_every_name_is_there(name):
    assert getattr(vr_jax, name) is not None
    assert name in dir(vr_jax)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'vr_jax' has no attribute 'Lava'"):
        vr_jax.Lava  # noqa: B018  # the access is what is tested


def test_type_checkers_see_the_same_names():
    """The names imported for type checkers, those of `__all__` and those that `__getattr__` finds are the same."""
    tree = ast.parse((ROOT / "vr_jax" / "__init__.py").read_text())
    checked = [node for node in tree.body if isinstance(node, ast.If)]
    imported = {alias.name for node in ast.walk(checked[0]) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert imported | {"__version__"} == set(vr_jax.__all__)


def test_the_example_of_the_first_steps_runs(tmp_path, monkeypatch, capsys):
    """The first block of Python in docs/first_steps.md answers a question, with a tiny model in place."""
    (code, *_) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "first_steps.md").read_text(), re.DOTALL)
    assert len(code.splitlines()) <= 10
    tiny.save(tmp_path / "runs" / "demo" / "model", vision_remember=False)
    images = tmp_path / "runs" / "demo" / "data" / "held_out" / "images"
    images.mkdir(parents=True)
    (images / "page-held_out-0-2.png").write_bytes(tiny.png(60, 30, 1))
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert capsys.readouterr().out.endswith("\n")


def test_importing_starts_nothing():
    """The package and the overview of the commands are there before JAX is imported."""
    program = "import sys, vr_jax; from vr_jax.cli.main import main; main(['--help']); print('jax' in sys.modules)"
    assert in_new_process(program).splitlines()[-1] == "False"


def test_importing_a_name_starts_no_backend():
    program = (
        "import vr_jax; [getattr(vr_jax, name) for name in vr_jax.__all__]; "
        "from jax._src import xla_bridge; print(xla_bridge.backends_are_initialized())"
    )
    assert in_new_process(program).splitlines()[-1] == "False"
