"""What is not a complete model directory of this format is refused in one line that names it."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.tiny import tiny_config
from vr_jax.errors import UserError
from vr_jax.model_directory import VERSION, copy_side_files, load_model, read_config, read_sections


def change_config(directory, **changes):
    """Changes fields of config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "has no config.json"),
        (
            lambda d: (d / "config.json").rename(d / "adapter_config.json"),
            "an adapter of PEFT, and .*--base=DIR. merges",
        ),
        (lambda d: (d / "config.json").write_text("{"), "not valid JSON"),
        (lambda d: (d / "config.json").write_text('{"model_type": "qwen2"}'), "vr-jax convert import"),
        (lambda d: change_config(d, version=1), r"format version 1, this vr_jax reads version 3; import .* again"),
        (lambda d: change_config(d, version=9), r"format version 9, this vr_jax reads version 3; update vr_jax"),
        (lambda d: change_config(d, version=None), "format version None"),
        (lambda d: change_config(d, projector={"name": "poll"}), "config.json: .*'poll'"),
        (lambda d: (d / "_COMPLETE").unlink(), "is incomplete: it has no _COMPLETE"),
        (lambda d: (d / "config.json").rename(d / "params" / "config.json"), "did you mean .*/params?"),
        (lambda d: shutil.rmtree(d / "params"), "has no params/"),
        (lambda d: (d / "params" / "_METADATA").unlink(), "is damaged"),
        (lambda d: [f.write_bytes(f.read_bytes()[:50]) for f in d.glob("params/**/d/*")], "is damaged"),
    ],
)
# Orbax closes its event loop at the first failed read; the other reads complain about that.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damage_is_one_line(saved, tmp_path, damage, message):
    directory = tmp_path / "model"
    shutil.copytree(saved, directory)
    damage(directory)
    with pytest.raises(UserError, match=message) as error:
        load_model(directory)
    assert "\n" not in str(error.value)
    assert str(directory) in str(error.value)


def test_a_folder_that_does_not_exist_brings_advice(saved, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copytree(saved, tmp_path / "run" / "model")
    with pytest.raises(UserError, match=r"run/modle is not .*: there is no such folder; did you mean .*/run/model\?"):
        read_config(tmp_path / "run" / "modle")
    with pytest.raises(UserError, match=r"no such folder; give one that .* of a run or of `vr-jax demo`"):
        read_config(tmp_path / "run" / "other")


def test_config_json_names_format_and_version(saved):
    values = json.loads((saved / "config.json").read_text())
    assert (values["format"], values["version"]) == ("vr_jax model", VERSION)
    assert read_config(saved) == tiny_config()
    assert read_sections(saved) == json.loads(json.dumps(tiny_config().to_dict()))


def test_files_of_the_tokenizer_are_copied_and_others_are_not(tmp_path):
    for name in ("tokenizer.json", "generation_config.json", "model.safetensors"):
        (tmp_path / name).write_text(name)
    (tmp_path / "copy").mkdir()
    copy_side_files(tmp_path, tmp_path / "copy")
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == ["generation_config.json", "tokenizer.json"]
    assert (tmp_path / "copy" / "tokenizer.json").read_text() == "tokenizer.json"
