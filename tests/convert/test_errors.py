"""A conversion that fails ends with exit status 2 and one line (or a list of tensors), and writes nothing."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.convert.conftest import TEXT, llava_layout, torch, write_checkpoint
from tests.model_directory.conftest import abstract
from tests.tiny import randomized, tiny_config
from vr_jax.model_directory import read_config, save_model


@pytest.fixture
def checkpoint(hf_dirs, tmp_path):
    """A copy of a Qwen2 directory, to be damaged."""
    directory = tmp_path / "hf"
    shutil.copytree(hf_dirs("qwen2")[1], directory)
    return directory


@pytest.fixture
def refused(convert, tmp_path):
    """Imports `--from directory ...`, expects a failure that leaves nothing; returns the message."""

    def run(directory, *arguments, lines: int = 1) -> str:
        before = sorted(os.listdir(tmp_path))
        status, out, err = convert("import", "--from", directory, "--to", tmp_path / "out", *arguments)
        assert status == 2
        assert err.startswith("vr-jax convert import: ")
        assert err.count("\n") == lines, err
        assert "Traceback" not in out + err
        assert sorted(os.listdir(tmp_path)) == before
        return err

    return run


def rewrite(directory, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def test_every_tensor_that_does_not_fit_is_listed(checkpoint, refused):
    def change(tensors):
        del tensors["model.norm.weight"]
        del tensors["model.layers.1.self_attn.q_proj.bias"]
        tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((31, 24), np.float32)
        tensors["model.layers.0.mlp.gate_proj.weight"] = np.zeros((32, 24), np.int8)
        tensors["model.layers.7.extra.weight"] = np.zeros((2, 3), np.float32)

    rewrite(checkpoint, change)
    err = refused(checkpoint, lines=6)
    assert "tensors that do not fit config.json: 5; take both from one checkpoint" in err
    assert "missing     model.norm.weight: expected (24,)" in err
    assert "missing     model.layers.1.self_attn.q_proj.bias: expected (24,)" in err
    assert "mis-shaped  model.layers.0.mlp.up_proj.weight: found (31, 24), expected (32, 24)" in err
    assert "mis-typed   model.layers.0.mlp.gate_proj.weight: found I8, expected one of F32, F16, BF16" in err
    assert "unexpected  model.layers.7.extra.weight: found (2, 3) in model.safetensors" in err


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_tensors_that_are_not_finite_are_listed(value, checkpoint, refused):
    def change(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value

    rewrite(checkpoint, change)
    err = refused(checkpoint, lines=2)
    assert "these tensors hold NaN or infinite values" in err
    assert "model.safetensors: model.layers.1.mlp.up_proj.weight" in err


def test_a_config_that_does_not_fit_the_weights(checkpoint, refused):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2, "layer_types": None}))
    per_layer = sum(".layers.2." in name for name in load_file(checkpoint / "model.safetensors"))
    err = refused(checkpoint, lines=1 + per_layer)
    assert err.count("unexpected  model.layers.2.") == per_layer


def test_truncated_safetensors(checkpoint, refused):
    file = checkpoint / "model.safetensors"
    for length in (len(file.read_bytes()) - 10, 1000, 4, 0):
        file.write_bytes(file.read_bytes()[:length])
        assert f"{file} is damaged or truncated" in refused(checkpoint)


def test_missing_shard_and_wrong_index(hf_dirs, tmp_path, refused):
    directory = tmp_path / "sharded"
    hf_dirs("qwen2")[0].save_pretrained(directory, max_shard_size="10KB")
    index_file = directory / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    wrong = index["weight_map"] | {"model.ghost": "model-00001-of-00002.safetensors"}
    first = sorted(directory.glob("model-*.safetensors"))[0]
    wrong = index["weight_map"] | {"model.ghost": first.name}
    index_file.write_text(json.dumps({"weight_map": wrong}))
    assert f"{first} lacks model.ghost" in refused(directory)
    index_file.write_text(json.dumps(index))
    first.unlink()
    assert f"lacks {first.name}, which model.safetensors.index.json lists" in refused(directory)
    index_file.write_text("{}")
    assert "has no weight_map" in refused(directory)


def test_no_weights_no_config_no_directory(checkpoint, refused, tmp_path):
    (checkpoint / "model.safetensors").unlink()
    assert "holds no weights: expected one of model.safetensors" in refused(checkpoint)
    (checkpoint / "model-00001-of-00002.safetensors").write_bytes(b"")
    assert "non_lora_trainables.safetensors, found model-00001-of-00002.safetensors" in refused(checkpoint)
    (checkpoint / "config.json").unlink()
    assert "config.json is missing; give the folder of a checkpoint" in refused(checkpoint)
    assert "nowhere is not a folder of a checkpoint" in refused(tmp_path / "nowhere")


def test_a_folder_of_models_names_those_in_it(checkpoint, refused, tmp_path):
    for name in ("b", "a"):
        shutil.copytree(checkpoint, tmp_path / "models" / name)
    (tmp_path / "models" / "empty").mkdir()
    err = refused(tmp_path / "models")
    assert f"{tmp_path}/models/config.json is missing, but 2 of its folders have one: a, b; give one of them" in err


@pytest.mark.parametrize("text", ['{"architectures": [', "[]", "\x80"])
def test_corrupt_config(text, checkpoint, refused):
    (checkpoint / "config.json").write_bytes(text.encode("latin-1"))
    assert str(checkpoint / "config.json") in refused(checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM is not known; known architectures: SiglipModel"),
        ({"architectures": None, "model_type": "bert"}, "model_type 'bert' is not known; known architectures:"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported, expected 'silu'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 2.0}}, "rope type 'yarn'"),
        (
            {"layer_types": ["full_attention"]},
            "layer_types names 1 layers, expected as many as num_hidden_layers = 3",
        ),
        ({"head_dim": 8}, "head_dim = 8, expected hidden_size / heads = 6"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": "big"}, "is no valid Qwen2Config"),
        ({"num_attention_heads": 5}, "hidden_size = 24 is not divisible by num_heads = 5"),
        ({"model_type": ["qwen2"]}, "model_type = ['qwen2'] does not fit architectures"),
        ({"model_type": "llama"}, "model_type = 'llama' does not fit architectures = ['Qwen2ForCausalLM']"),
    ],
)
def test_a_config_that_our_decoder_does_not_support(change, message, checkpoint, refused):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | change))
    assert message in refused(checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_feature_select_strategy": "default"}, "vision_feature_select_strategy = 'default' is not supported"),
        ({"vision_feature_layer": [-2, -1]}, "vision_feature_layer = [-2, -1] is not supported"),
        ({"image_grid_pinpoints": [[24, 30]]}, "[(30, 24)] are no multiples of the tile size 24"),
        ({"vision_aspect_ratio": "odd"}, "vision_aspect_ratio = 'odd' is not supported, expected 'anyres_max_N'"),
        ({"vision_aspect_ratio": "pad"}, "vision_aspect_ratio = 'pad' is not supported, expected 'anyres_max_N'"),
        ({"model_type": "llava_next"}, "model_type = 'llava_next' does not fit architectures"),
        ({"architectures": ["LlavaNextForConditionalGeneration"]}, "whose model_type is 'llava_next'"),
        (
            {"vision_config": {"model_type": "siglip2_vision_model"}},
            "vision_config.model_type is 'siglip2_vision_model'",
        ),
    ],
)
def test_a_llava_config_that_our_model_does_not_support(change, message, hf_dirs, tmp_path, refused):
    shutil.copytree(hf_dirs("onevision")[1], tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | change))
    assert message in refused(tmp_path / "hf")


def test_the_class_tells_a_onevision_whose_model_type_is_absent(hf_dirs, tmp_path, converted):
    shutil.copytree(hf_dirs("onevision")[1], tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    del config["model_type"]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    converted("import", "--from", tmp_path / "hf", "--to", tmp_path / "out")
    assert read_config(tmp_path / "out").image.aspect_ratio == "anyres_max"


def test_a_field_that_next_leaves_out_has_to_be_written(hf_dirs, tmp_path, refused):
    """The default of the class is not computed here, and `--ignore` cannot change it."""
    shutil.copytree(hf_dirs("next")[1], tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    del config["vision_feature_select_strategy"]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    message = refused(tmp_path / "hf")
    assert "vision_feature_select_strategy is absent, and its class takes 'default', but only 'full'" in message
    assert "write it into the file" in message


def test_a_damaged_tokenizer_is_refused_and_an_absent_one_is_told(checkpoint, refused, converted, tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    (checkpoint / "tokenizer.json").write_text(pointer)
    assert "tokenizer.json is not valid JSON" in refused(checkpoint)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (checkpoint / name).unlink(missing_ok=True)
    out = converted("import", "--from", checkpoint, "--to", tmp_path / "out")
    assert "has no tokenizer; copy tokenizer.json" in out


def test_ignoring_what_is_not_there_is_refused(checkpoint, refused):
    message = refused(checkpoint, "--ignore=quantization")
    assert f"--ignore=quantization: no file of {checkpoint} has this field or name" in message


class Bomb:
    """An object whose unpickling would create a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_pickle_that_would_run_code(writer, checkpoint, refused, tmp_path):
    (checkpoint / "model.safetensors").unlink()
    state = {"model.norm.weight": Bomb(tmp_path / "exploded")}
    if writer == "torch":
        torch.save(state, checkpoint / "pytorch_model.bin")
    else:
        (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps(state))
    assert "pytorch_model.bin is refused: loading it would " in refused(checkpoint)
    assert not (tmp_path / "exploded").exists()


def test_damaged_pickles(checkpoint, refused):
    (checkpoint / "model.safetensors").unlink()
    file = checkpoint / "pytorch_model.bin"
    torch.save({"model.norm.weight": torch.ones(1000)}, file)
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"hardly a pickle"):
        file.write_bytes(damaged)
        assert f"{file} is damaged or truncated" in refused(checkpoint)
    torch.save([1, 2], file)
    assert "is not a state dict" in refused(checkpoint)


def test_bin_without_torch(checkpoint, refused, monkeypatch):
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "reading .bin files needs torch: pip install 'vr-jax[torch]'" in refused(checkpoint)


def test_parts_of_the_wrong_kind(hf_dirs, refused, tmp_path, convert):
    siglip, qwen2 = hf_dirs("siglip_vision")[1], hf_dirs("qwen2")[1]
    assert "--encoder" in refused(qwen2, "--encoder", qwen2)
    assert "only complete a directory" in refused(qwen2, "--encoder", siglip)
    status, _, err = convert("import", "--to", tmp_path / "out")
    assert (status, err) == (2, "vr-jax convert import: nothing to import: give --from, or --encoder and --decoder\n")


def test_llava_without_its_parts(hf_dirs, tmp_path, refused):
    config, tensors = llava_layout(hf_dirs("onevision")[0])
    siglip, qwen2 = hf_dirs("siglip_vision")[1], hf_dirs("qwen2")[1]
    whole = write_checkpoint(tmp_path / "whole", config, tensors)
    assert "mm_vision_tower 'google/siglip-tiny' is unknown, give its directory with --encoder" in refused(whole)
    assert "already holds a decoder; leave --decoder out" in refused(whole, "--encoder", siglip, "--decoder", qwen2)
    projector = {name: tensor for name, tensor in tensors.items() if "mm_projector" in name}
    part = write_checkpoint(tmp_path / "part", config, projector)
    assert "holds no encoder; give that it was trained with: --encoder DIR" in refused(part)
    assert "holds no decoder; give that it was trained with: --decoder DIR" in refused(part, "--encoder", siglip)
    # With unpad the newline is a parameter like any other.
    err = refused(part, "--encoder", siglip, "--decoder", qwen2, lines=2)
    assert f"missing     model.image_newline: expected ({TEXT['hidden_size']},)" in err
    odd = write_checkpoint(tmp_path / "odd", config | {"mm_projector_type": "linear"}, tensors)
    assert "mm_projector_type = 'linear' is not supported, expected 'mlp2x_gelu'" in refused(odd, "--encoder", siglip)


def test_a_name_given_twice(hf_dirs, tmp_path, refused):
    _, source = hf_dirs("onevision")
    tensors = load_file(source / "model.safetensors")
    tensors["model.image_newline"] = tensors["image_newline"].copy()
    twice = write_checkpoint(tmp_path / "twice", json.loads((source / "config.json").read_text()), tensors)
    assert "holds both image_newline and model.image_newline" in refused(twice)


def test_existing_target_is_kept_unless_overwrite(checkpoint, convert, converted, tmp_path):
    converted("import", "--from", checkpoint, "--to", tmp_path / "out")
    (tmp_path / "out" / "mark").write_text("")
    for command in ("import", "export"):
        source = checkpoint if command == "import" else tmp_path / "out"
        status, _, err = convert(command, "--from", source, "--to", tmp_path / "out")
        assert status == 2
        message = "exists; choose another folder, or overwrite it" if command == "import" else "would replace"
        assert message in err
    assert (tmp_path / "out" / "mark").exists()
    rewrite(checkpoint, lambda tensors: tensors.pop("model.norm.weight"))
    assert convert("import", "--from", checkpoint, "--to", tmp_path / "out", "--overwrite")[0] == 2
    assert (tmp_path / "out" / "mark").exists()  # a failed import does not cost the old directory


def test_already_a_model_directory(checkpoint, converted, refused, tmp_path):
    converted("import", "--from", checkpoint, "--to", tmp_path / "ours")
    assert "is a model directory of vr_jax already; it needs no import" in refused(tmp_path / "ours")


def test_full_disk_found_before(checkpoint, refused, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    message = refused(checkpoint)
    assert "cannot be written: " in message
    assert " are needed, 100 bytes are free on its disk" in message


@pytest.mark.slow  # Each converts until the disk is full; model_directory/test_writing.py has the writer's.
@pytest.mark.parametrize("command", ["import", "export"])
def test_disk_that_fills_up(command, checkpoint, converted, tmp_path):
    """A real process under a limit of 4 kB per file: no traceback, exit status 2, nothing left."""
    source = checkpoint
    if command == "export":
        source = tmp_path / "ours"
        converted("import", "--from", checkpoint, "--to", source)
    script = (
        "import resource, sys, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096));"
        "sys.argv.insert(1, 'convert'); runpy.run_module('vr_jax', run_name='__main__')"
    )
    before = sorted(os.listdir(tmp_path))
    # Without -B, the interpreter would also write bytecode, cut off at the limit, which no later process can import.
    result = subprocess.run(
        [sys.executable, "-B", "-c", script, command, "--from", source, "--to", tmp_path / "out"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert "File too large" in result.stderr
    assert sorted(os.listdir(tmp_path)) == before


def test_directories_that_cannot_be_exported(hf_dirs, convert, converted, tmp_path):
    siglip, qwen2 = hf_dirs("siglip_vision")[1], hf_dirs("qwen2")[1]
    status, _, err = convert("export", "--from", siglip, "--to", tmp_path / "out")
    assert status == 2
    assert "is not of a vr_jax model directory" in err
    converted("import", "--encoder", siglip, "--decoder", qwen2, "--to", tmp_path / "parts")
    status, _, err = convert("export", "--from", tmp_path / "parts", "--to", tmp_path / "out")
    assert status == 2
    assert "holds parts of a model (decoder, encoder)" in err
    converted("import", "--from", siglip, "--to", tmp_path / "tower")
    status, _, err = convert("export", "--from", tmp_path / "tower", "--layout", "llava", "--to", tmp_path / "out")
    assert (status, "needs a whole model" in err) == (2, True)
    save_model(tmp_path / "remember", randomized(abstract(tiny_config())))
    status, _, err = convert("export", "--from", tmp_path / "remember", "--layout", "hf", "--to", tmp_path / "out")
    assert (status, "no model with re-fusion block 'vision_remember'" in err) == (2, True)
    assert not (tmp_path / "out").exists()
