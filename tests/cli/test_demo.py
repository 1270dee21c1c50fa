"""`vr-jax demo` keeps its folder to itself, empties only its own, and leaves a model with Vision Remember in it."""

import os
import signal
import time
from types import SimpleNamespace

import pytest

from vr_jax.cli import demo
from vr_jax.cli.main import main
from vr_jax.data.demo.pages import KINDS
from vr_jax.demo import SYSTEMS, find_systems
from vr_jax.errors import UserError
from vr_jax.storage import complete_directory


@pytest.fixture
def compared(monkeypatch):
    """Stands in for the trainings: every system gets a model that holds its name. Collects the systems of each call."""
    calls = []

    def compare(workdir, *, systems, **_):
        calls.append([system.name for system in systems])
        results = []
        for system in systems:
            with complete_directory(workdir / system.name) as written:
                (written / "name").write_text(system.name)
            results.append(SimpleNamespace(system=system, model=workdir / system.name))
        return results

    monkeypatch.setattr(demo, "compare", compare)
    return calls


def test_the_model_with_vision_remember_has_a_short_path(tmp_path, compared):
    workdir = tmp_path / "demo"
    assert main(["demo", f"--workdir={workdir}", "--systems=pooling_9,vision_remember_16"]) == 0
    assert compared == [["pooling_9", "vision_remember_16"]]
    assert (workdir / "model" / "name").read_text() == "vision_remember_16"
    assert main(["demo", f"--workdir={workdir}"]) == 0, "an earlier demo is replaced"
    assert (workdir / "model" / "name").read_text() == "vision_remember_9"


def test_a_folder_with_other_files_is_kept(tmp_path, compared, capsys):
    (tmp_path / "mine").write_text("")
    assert main(["demo", f"--workdir={tmp_path}"]) == 2
    assert f"{tmp_path} holds other files; give an empty --workdir" in capsys.readouterr().err
    assert not compared


def test_a_demo_that_runs_is_not_emptied_by_another(tmp_path, compared, monkeypatch, capsys):
    inner = []
    finished = demo.compare

    def compare(workdir, **settings):
        results = finished(workdir, **settings)
        inner.append(main(["demo", f"--workdir={workdir}"]))
        return results

    monkeypatch.setattr(demo, "compare", compare)
    assert main(["demo", f"--workdir={tmp_path / 'demo'}"]) == 0
    assert inner == [2]
    assert "another run" in capsys.readouterr().err
    assert len(compared) == 1
    assert (tmp_path / "demo" / "model" / "name").exists()


def test_systems_are_found_by_name_in_their_order():
    assert find_systems(["pooling_16", "vision_remember_9"]) == (SYSTEMS[0], SYSTEMS[3])
    with pytest.raises(UserError, match=r"no system 'pool'; choose among vision_remember_9, pooling_9"):
        find_systems(["pool", "vision_remember_9"])
    with pytest.raises(UserError, match="pooling_9 is named twice"):
        find_systems(["pooling_9", "vision_remember_9", "pooling_9"])
    with pytest.raises(UserError, match="--systems=pooling_9: none has Vision Remember"):
        find_systems(["pooling_9"])


def test_too_few_held_out_pages_are_refused_before_anything_is_trained(tmp_path, compared, capsys):
    """The page has a score for each kind of page, and the kinds take turns."""
    assert main(["demo", f"--workdir={tmp_path / 'demo'}", f"--held_out={len(KINDS) - 1}"]) == 2
    assert "--held_out=4: expected an integer >= 5" in capsys.readouterr().err
    assert not compared
    assert main(["demo", f"--workdir={tmp_path / 'demo'}", f"--held_out={len(KINDS)}"]) == 0


def test_a_demo_that_is_ended_by_a_signal_ends_its_processes(tmp_path, monkeypatch, capsys):
    cleaned = []

    def compare(*_, **settings):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)
        finally:
            cleaned.append(True)

    monkeypatch.setattr(demo, "compare", compare)
    assert main(["demo", f"--workdir={tmp_path / 'demo'}"]) == 130
    assert cleaned
    assert capsys.readouterr().err.count("\n") == 1
