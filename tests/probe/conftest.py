"""One tiny model directory and one generated data set, three images of which cannot be read."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.inference import tiny
from vr_jax.probe import stand_in, tiny_imagenet
from vr_jax.probe.main import ProbeOptions, run
from vr_jax.probe.results import ProbeResult

LAYERS = (1, 3)
QUICK = {"layers": LAYERS, "width": 32, "heads": 4, "epochs": 8, "batch_size": 64, "seeds": 2, "lr": 2e-2}


@dataclass(frozen=True)
class Setting:
    checkpoint: Path
    data: Path
    broken: tuple[str, str, str]  # a training image, then two of validation


@pytest.fixture(scope="session")
def setting(tmp_path_factory) -> Setting:
    folder = tmp_path_factory.mktemp("probe")
    stand_in.write(folder / "data", classes=4, train=60, val=16)
    data = tiny_imagenet.read(folder / "data")
    broken = (data.train[5].name, data.val[3].name, data.val[9].name)
    for name in broken[:2]:
        (data.folder / name).write_bytes((data.folder / name).read_bytes()[:200])
    (data.folder / broken[2]).unlink()
    return Setting(tiny.save(folder / "model"), folder / "data", broken)


@pytest.fixture(scope="session")
def result(setting) -> tuple[ProbeResult, Path]:
    """A whole run on all eight devices, and its folder."""
    options = ProbeOptions(checkpoint=setting.checkpoint, data=setting.data, **QUICK)
    return run(options, progress=False), setting.checkpoint / "probe"


@pytest.fixture
def copied(result, tmp_path) -> Path:
    """The results of that run, to damage."""
    shutil.copytree(result[1], tmp_path / "probe")
    assert json.loads((tmp_path / "probe" / "results.json").read_text())
    return tmp_path / "probe"
