"""Config files from Python: the same recipe as absl's flag gives, and one line for what cannot be loaded."""

import pytest
from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from tests.commands import run
from vr_jax.settings.config_files import RecipeError, load_recipe


@pytest.mark.parametrize(
    "spec", ["configs/demo.py", "configs/demo.py:uncompressed", "configs/tables/paper.py:table4/fastv"]
)
def test_it_is_what_the_flag_gives(spec):
    values = flags.FlagValues()
    flag = config_flags.DEFINE_config_file("config", flag_values=values)
    values(["program", f"--config={spec}"])
    assert isinstance(load_recipe(spec), ConfigDict)
    assert load_recipe(spec).to_json() == flag.value.to_json()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere.py", "config nowhere.py does not exist"),
        ("configs/demo.py:no", "config configs/demo.py:no: no variant 'no'"),
        ("configs/tables/paper.py:table9/x", "no table 'table9': expected one of table1, "),
        ("README.md", "config README.md: expected a Python file"),
    ],
)
def test_mistakes_are_one_line(spec, message):
    with pytest.raises(RecipeError, match=message) as error:
        load_recipe(spec)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_config(tmp_path):
    for text, message in (("def other(): ...", "has no get_config"), ("1 +", "cannot be loaded: SyntaxError")):
        path = tmp_path / "config.py"
        path.write_text(text)
        with pytest.raises(RecipeError, match=message):
            load_recipe(path)


def test_the_demo_says_so(capsys, tmp_path):
    assert run("demo", config="nowhere.py", workdir=tmp_path) == 2
    assert capsys.readouterr().err.startswith("vr-jax demo: config nowhere.py does not exist")
