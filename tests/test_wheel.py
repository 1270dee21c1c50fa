"""The wheel: it holds every module, the config files and the data files, and its program runs from an empty folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The files of the wheel, unpacked; it is built from a copy, so that no build folder is left in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not names:
        pytest.skip("the checkout has no git: the files of the project are not known")
    for name in names:
        if name.startswith(("vr_jax/", "configs/")) or "/" not in name:
            (folder / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "copy" / name).write_bytes((ROOT / name).read_bytes())
    command = ["pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", f"--wheel-dir={folder}", "./copy"]
    done = subprocess.run([sys.executable, "-m", *command], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package(wheel):
    files = [path for path in (ROOT / "vr_jax").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    missing = [path.relative_to(ROOT) for path in files if not (wheel / path.relative_to(ROOT)).is_file()]
    assert missing == []
    for path in (ROOT / "configs").rglob("*.py"):
        assert (wheel / "vr_jax" / path.relative_to(ROOT)).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_the_program_of_the_wheel_reads_packaged_configs(wheel, tmp_path):
    program = (
        "from vr_jax.cli.main import main; from vr_jax.settings import load_config; import vr_jax; "
        "print(vr_jax.__file__, load_config('configs/tables/paper.py:table3/deepstack').model.refusion.name); "
        "main(['--help'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(wheel)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == f"{wheel / 'vr_jax' / '__init__.py'} deepstack"
    assert "vr-jax demo" in done.stdout
