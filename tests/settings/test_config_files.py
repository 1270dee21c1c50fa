"""Config files: what `--config=FILE[:VARIANT]` gives, and one line for a file that cannot be used."""

import pytest
from ml_collections import ConfigDict

from tests.commands import run
from vr_jax.errors import ConfigError
from vr_jax.settings import TrainConfig, load_config, read_config_file
from vr_jax.settings.config_files import packaged_config, packaged_configs, split_variant

MODEL = """
from ml_collections import ConfigDict
from vr_jax.settings import read_config_file


def get_config(variant="large"):
    config = read_config_file("configs/demo.py").to_dict()
    {body}
    return ConfigDict(config)
"""


def write(tmp_path, body):
    path = tmp_path / "mine.py"
    path.write_text(MODEL.format(body=body))
    return path


def test_a_file_gives_a_config_dict_and_checked_settings():
    values = read_config_file("configs/demo.py:uncompressed")
    assert isinstance(values, ConfigDict)
    config = load_config("configs/demo.py:uncompressed")
    assert config == TrainConfig.from_config_dict(values)
    assert config.model.projector.name == "mlp"


def test_the_variant_reaches_the_file(tmp_path):
    path = write(tmp_path, 'config["steps"] = {"large": 7, "small": 3}[variant]')
    assert [load_config(f"{path}{variant}").steps for variant in ("", ":small")] == [7, 3]


def test_overrides_are_applied_to_the_file():
    config = load_config("configs/demo.py", ["steps=3", "model.refusion=None"])
    assert (config.steps, config.model.refusion) == (3, None)


def test_a_config_of_the_package_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/demo.py").tokenizer == "demo"
    assert "configs/tables/paper.py" in packaged_configs()
    assert packaged_config("configs/../setup.py") is None


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("demo", r"config demo does not exist; did you mean configs/demo.py\? give the path of a file"),
        ("nowhere.py", "config nowhere.py does not exist; give the path of a file, or a packaged config: configs/demo"),
        ("configs/demo.py:no", "config configs/demo.py:no: no variant 'no'"),
        ("configs/tables/paper.py:table9/x", "no table 'table9': expected one of table1, "),
        ("README.md", "config README.md: expected a Python file"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(spec, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_config(spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def other(): ...", "has no function get_config"),
        ("import os\n1 +", "cannot be run: line 2: SyntaxError"),
        ("import nothing_of_that_name", "cannot be run: line 1: ModuleNotFoundError"),
        ("def get_config():\n    return 3", "get_config returned int; expected a ConfigDict"),
        ("def get_config():\n    return {}['steps']", "line 2: KeyError"),
        ("def get_config():\n    assert 1 == 2, 'no'", "line 2: AssertionError: no"),
        ("def get_config():\n    raise NotImplementedError('phase 3')", "line 2: NotImplementedError: phase 3"),
        ("def get_config():\n    return get_config()", "RecursionError: maximum recursion depth"),
        ("int('x')", "cannot be run: line 1: ValueError: invalid literal"),
        ("import sys\nsys.exit(0)", "cannot be run: line 2: SystemExit: 0"),
        ("def get_config():\n    return {'a.b': 1}", "what get_config returned is no ConfigDict: "),
        ("def get_config():\n    return {1: 2, 'model': {}}", "what get_config returned is no ConfigDict: "),
        (
            "from ml_collections import config_dict as c\n\n\ndef get_config():\n"
            "    return {'steps': c.required_placeholder(int)}",
            "what get_config returned is no ConfigDict: .*RequiredValueError",
        ),
    ],
)
def test_a_mistake_in_the_file_is_one_line_with_its_place(tmp_path, text, message):
    path = tmp_path / "config.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_config(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_wrong_setting_names_the_file_and_the_field(tmp_path):
    path = write(tmp_path, 'config["optimizer"]["lrr"] = 1.0')
    with pytest.raises(ConfigError, match=r"mine\.py: config\.optimizer has no field 'lrr'; did you mean 'lr'\?"):
        load_config(path)
    path = tmp_path / "empty.py"
    path.write_text("def get_config():\n    return {'steps': 1}")
    with pytest.raises(ConfigError, match=r"empty\.py: config\.model is missing"):
        load_config(path)


def test_a_command_ends_with_that_line(capsys, tmp_path):
    assert run("train", config="nowhere.py", workdir=tmp_path) == 2
    assert capsys.readouterr().err.startswith("vr-jax train: config nowhere.py does not exist")


def test_a_colon_in_a_name_is_none_before_a_variant(tmp_path):
    folder = tmp_path / "a:b"
    folder.mkdir()
    (folder / "c:d.py").touch()
    file = str(folder / "c:d.py")
    assert split_variant(file) == (file, "", "")
    assert split_variant(f"{file}:phase1/x:y") == (file, ":", "phase1/x:y")
    assert split_variant("configs/demo.py:uncompressed") == ("configs/demo.py", ":", "uncompressed")
    assert split_variant("nowhere.py:phase1") == ("nowhere.py", ":", "phase1")
