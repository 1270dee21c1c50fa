"""`vr-jax efficiency` as a user meets it: the files, and one line for a mistake."""

import pytest

from tests.efficiency import tiny_systems
from vr_jax.cli import efficiency as command
from vr_jax.cli.main import main
from vr_jax.efficiency import JSON, MARKDOWN, PLOT


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    return tiny_systems.write(tmp_path_factory.mktemp("configs"))


@pytest.mark.slow  # It measures a model.
def test_the_table_and_the_files(config_file, tmp_path, capsys):
    flags = ["--repeats=1", "--warmup=1", "--new_tokens=2", "--text_tokens=40", f"--output={tmp_path / 'out'}"]
    assert main(["efficiency", f"--config={config_file}:baseline", "--score=42.9", *flags]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[1].startswith("baseline")
    assert "efficiency: baseline: compiling" in err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted((JSON, MARKDOWN, PLOT))


def test_results_are_replaced_only_on_request(config_file, tmp_path, capsys, monkeypatch):
    (tmp_path / JSON).write_text("{}")
    arguments = ["efficiency", f"--config={config_file}", f"--output={tmp_path}"]
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"{JSON} exists; choose another --output, or replace it with --overwrite" in err
    assert (tmp_path / JSON).read_text() == "{}"
    monkeypatch.setattr(command, "measure", lambda *_: pytest.fail("past the check"))
    with pytest.raises(pytest.fail.Exception, match="past the check"):
        main([*arguments, "--overwrite"])
    assert main(["efficiency", f"--config={config_file}", f"--output={config_file}"]) == 2
    assert "is not a folder; choose another one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config is missing"),
        (["--config=nowhere.py"], "config nowhere.py does not exist"),
        (["--config=FILE:other"], "no variant 'other': expected one of baseline"),
        (["--config=FILE:no_model"], "config.model is missing"),
        (["--config=FILE", "--config=FILE"], "is given twice"),
        (["--config=FILE", "--score=1", "--score=2"], "2 scores are given for 1 systems (tiny)"),
        (["--config=FILE", "--new_tokens=1"], "--new_tokens=1: expected an integer >= 2"),
        (["--config=FILE", "--text_tokens=3"], "text_tokens = 3: the chat template and one digit need"),
        (["--config=FILE", "--buckets", "--text_tokens=40000"], "the largest bucket holds 32768"),
        (["--checkpoint=FILE"], "is not a model directory"),
    ],
)
def test_a_mistake_is_one_line(config_file, capsys, arguments, message):
    assert main(["efficiency", *(argument.replace("FILE", str(config_file)) for argument in arguments)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("vr-jax efficiency: ")
    assert message in last
