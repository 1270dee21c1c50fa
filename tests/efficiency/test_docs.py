"""The commands of docs/efficiency.md exist, and the first one runs at a small size."""

import pytest

from tests.docs import commands
from tests.golden.discovery import REPOSITORY
from vr_jax.cli.efficiency import EfficiencyFlags
from vr_jax.cli.flags import parse
from vr_jax.cli.main import main

COMMANDS = [words[1:] for words in commands("efficiency.md") if words[0] == "efficiency"]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_flag_exists(words):
    parse(EfficiencyFlags, words)


@pytest.mark.slow
def test_the_first_command_runs(tmp_path, monkeypatch):
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    monkeypatch.chdir(tmp_path)
    assert main(["efficiency", *COMMANDS[0], "--repeats=1", "--warmup=1", "--new_tokens=2"]) == 0
    assert (tmp_path / "runs" / "efficiency_demo" / "efficiency.svg").exists()
