"""The commands of docs/probe.md exist, and those that need no trained model run at a small size."""

import pytest

from tests.docs import commands
from tests.golden.discovery import REPOSITORY
from vr_jax.cli.flags import parse
from vr_jax.cli.main import main
from vr_jax.cli.probe import COMMAND
from vr_jax.cli.train import TrainFlags

PROBE_COMMANDS = [words[1:] for words in commands("probe.md") if words[0] == "probe"]


@pytest.mark.parametrize("words", PROBE_COMMANDS, ids=" ".join)
def test_every_flag_exists(words):
    action = COMMAND.actions.get(words[0])
    parse((action or COMMAND.default).flags, words[1:] if action else words)


def test_every_flag_of_the_training_exists():
    lines = [words[1:] for words in commands("probe.md") if words[0] == "train"]
    assert len(lines) == 2
    for words in lines:
        parse(TrainFlags, words)


@pytest.mark.slow
def test_random_weights_run(tmp_path, monkeypatch):
    stand_in = next(words for words in PROBE_COMMANDS if words[0] == "stand_in")
    random = next(words for words in PROBE_COMMANDS if "--random" in words)
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    monkeypatch.chdir(tmp_path)
    assert main(["probe", *stand_in, "--classes=2", "--train=4", "--val=2"]) == 0
    assert main(["probe", *random, "--epochs=1", "--batch_size=8", "--seeds=1", "--width=16"]) == 0
    assert (tmp_path / "runs" / "probe_random" / "probe.svg").exists()
