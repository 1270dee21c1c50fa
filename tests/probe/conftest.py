"""One tiny model directory and one generated data set, three images of which cannot be read."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.inference import tiny
from vr_jax.probe import ProbeResult, run_probe, tiny_imagenet, write_stand_in
from vr_jax.settings import ProbeSettings

LAYERS = (1, 3)
# These settings make a run short and still let the heads learn.
QUICK = {"layers": LAYERS, "width": 32, "heads": 4, "epochs": 8, "batch_size": 64, "seeds": 2, "lr": 2e-2}


@dataclass(frozen=True)
class Setting:
    """A model directory and a data set.

    Attributes:
        checkpoint: The model directory.
        data: The folder of the data.
        broken: The names of the images that cannot be read: one for training, then two for validation.
    """

    checkpoint: Path
    data: Path
    broken: tuple[str, str, str]

    def settings(self, **changes) -> ProbeSettings:
        """The settings of a quick run."""
        paths = {"checkpoint": str(self.checkpoint), "data": str(self.data)}
        return ProbeSettings(**paths | QUICK | changes)


@pytest.fixture(scope="session")
def setting(tmp_path_factory) -> Setting:
    folder = tmp_path_factory.mktemp("probe")
    write_stand_in(folder / "data", classes=4, train=60, val=16)
    data = tiny_imagenet.read(folder / "data")
    broken = (data.train[5].name, data.val[3].name, data.val[9].name)
    for name in broken[:2]:
        (data.folder / name).write_bytes((data.folder / name).read_bytes()[:200])
    (data.folder / broken[2]).unlink()
    return Setting(tiny.save(folder / "model"), folder / "data", broken)


@pytest.fixture(scope="session")
def result(setting) -> tuple[ProbeResult, Path]:
    """The result of a whole run on all eight devices, and its folder."""
    return run_probe(setting.settings(), progress=False), setting.checkpoint / "probe"


@pytest.fixture(scope="session")
def generated(tmp_path_factory) -> Path:
    """A generated data set of three classes, which no test changes."""
    folder = tmp_path_factory.mktemp("data") / "stand_in"
    write_stand_in(folder, classes=3, train=50, val=4)
    return folder


@pytest.fixture
def folder(generated, tmp_path) -> Path:
    """A copy of that data set for a test to damage."""
    shutil.copytree(generated, tmp_path / "data")
    return tmp_path / "data"
