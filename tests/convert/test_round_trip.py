"""Import, export and back: identical arrays, checked against an independent mapping (independent_mapping.py)."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.convert import independent_mapping
from tests.convert.conftest import (
    PINPOINTS,
    TEXT,
    VISION,
    llava_layout,
    torch,
    transformers,
    weights_of,
    write_checkpoint,
)
from tests.tiny import params_of
from vr_jax.model.parameters import merge_stages
from vr_jax.model_directory import load_model, load_params, read_config, read_sections

CLASSES = {
    "siglip": "SiglipVisionModel",
    "siglip_vision": "SiglipVisionModel",
    "clip": "CLIPVisionModel",
    "clip_vision": "CLIPVisionModel",
    "clip_projection": "CLIPVisionModel",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "LlamaForCausalLM",  # which computes the same
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_tied": "Qwen2ForCausalLM",
    "onevision": "LlavaOnevisionForConditionalGeneration",
    "onevision_tied": "LlavaOnevisionForConditionalGeneration",
    "next": "LlavaNextForConditionalGeneration",
}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)
        assert found[path].dtype == value.dtype


def expected_params(model) -> dict[str, np.ndarray]:
    """Our merged parameters of a torch model, by the independent mapping."""
    weights = weights_of(model)
    expected: dict[str, np.ndarray] = {}
    for prefix in ("vision_model.", "model.vision_tower.", ""):
        tower = independent_mapping.under(weights, prefix)
        if "embeddings.patch_embedding.weight" in tower:
            read = independent_mapping.clip if "pre_layrnorm.weight" in tower else independent_mapping.siglip
            staged = read(tower, [0, VISION["num_hidden_layers"]])
            expected |= {f"encoder.{path}": value for path, value in staged.items()}
            break
    for prefix in ("model.language_model.", "model."):
        decoder = independent_mapping.under(weights, prefix)
        if "embed_tokens.weight" in decoder:
            if not model.config.tie_word_embeddings:
                decoder["lm_head.weight"] = weights["lm_head.weight"]
            staged = independent_mapping.qwen2(decoder, [0, TEXT["num_hidden_layers"]])
            expected |= {f"decoder.{path}": value for path, value in staged.items()}
            break
    if "model.image_newline" in weights:
        expected["image_newline"] = weights["model.image_newline"]
        for ours, theirs in (("fc1", "linear_1"), ("fc2", "linear_2")):
            expected[f"projector.{ours}.kernel"] = weights[f"model.multi_modal_projector.{theirs}.weight"].T
            expected[f"projector.{ours}.bias"] = weights[f"model.multi_modal_projector.{theirs}.bias"]
    return merge_stages(expected)


@pytest.mark.parametrize("kind", list(CLASSES))
def test_hugging_face(kind, hf_dirs, tmp_path, converted):
    """save_pretrained -> import -> export (several shards) -> from_pretrained -> the same tensors."""
    model, source = hf_dirs(kind)
    converted("import", "--from", source, "--to", tmp_path / "ours")
    params = load_params(tmp_path / "ours")
    assert_same(params, expected_params(model))

    converted("export", "--from", tmp_path / "ours", "--to", tmp_path / "out", "--shard-gb", "0.00001")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert (tmp_path / "out" / "tokenizer_config.json").is_file() != kind.startswith(("siglip", "clip"))
    back, info = getattr(transformers, CLASSES[kind]).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    original = weights_of(model)
    if kind in ("siglip", "clip", "clip_projection"):
        original = independent_mapping.under(original, "vision_model.")
    for name, value in weights_of(back).items():
        np.testing.assert_array_equal(value, original[name], err_msg=name)

    converted("import", "--from", tmp_path / "out", "--to", tmp_path / "again")
    assert_same(load_params(tmp_path / "again"), params)
    assert read_sections(tmp_path / "again") == read_sections(tmp_path / "ours")


def test_siglip_lists_what_it_leaves_out(hf_dirs, tmp_path, converted):
    out = converted("import", "--from", hf_dirs("siglip")[1], "--to", tmp_path / "ours")
    weights = weights_of(hf_dirs("siglip")[0])
    text = sum(name.startswith("text_model.") for name in weights)
    head = sum(name.startswith("vision_model.head.") for name in weights)
    assert f"ignored on purpose: {text} tensors (SigLIP's text tower)" in out
    assert f"ignored on purpose: {head} tensors (SigLIP's pooling head" in out
    assert "ignored on purpose: 2 tensors (SigLIP's contrastive loss)" in out


def test_config_of_onevision_and_next(hf_dirs, tmp_path, converted):
    converted("import", "--from", hf_dirs("onevision")[1], "--to", tmp_path / "onevision")
    config = read_config(tmp_path / "onevision")
    assert (config.encoder.num_layers, config.vision_feature_layer) == (3, 3)  # -1
    assert (config.projector.name, config.projector.stride, config.refusion) == ("mlp", 1, None)
    assert (config.image.aspect_ratio, config.image.max_tiles, config.image.unpad) == ("anyres_max", 9, True)
    assert config.image.grids == tuple((width // 24, height // 24) for height, width in PINPOINTS)
    assert config.image.unpad_rounding == "round7"
    assert config.decoder.rope_theta == 10000.0
    converted("import", "--from", hf_dirs("next")[1], "--to", tmp_path / "next")
    config = read_config(tmp_path / "next")
    assert (config.image.aspect_ratio, config.vision_feature_layer) == ("anyres", 2)  # -2


@pytest.mark.parametrize("version", ["4", "4.52", "5 in memory"])
def test_key_layouts_of_transformers(version, hf_dirs, tmp_path, converted):
    """The same weights under the names of several versions."""
    model, source = hf_dirs("onevision")
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        name = name.replace("vision_tower.", "vision_tower.vision_model.")
        if version != "4":
            name = name.replace("language_model.lm_head", "lm_head").replace("language_model.model", "language_model")
            name = name if name.startswith("lm_head") else f"model.{name}"
        tensors[name] = tensor
    if version == "5 in memory":
        tensors = weights_of(model)
    config = json.loads((source / "config.json").read_text())
    directory = write_checkpoint(tmp_path / "hf", config, tensors)
    converted("import", "--from", directory, "--to", tmp_path / "ours")
    assert_same(load_params(tmp_path / "ours"), expected_params(model))


def test_bfloat16_is_kept_or_widened(hf_dirs, tmp_path, converted):
    model, source = hf_dirs("qwen2")
    half = {name: t.astype(ml_dtypes.bfloat16) for name, t in load_file(source / "model.safetensors").items()}
    # One layer in another type: its whole stack is stored in the wider one.
    mixed = "model.layers.1.mlp.up_proj.weight"
    half[mixed] = half[mixed].astype(np.float32)
    directory = write_checkpoint(tmp_path / "hf", json.loads((source / "config.json").read_text()), half)
    converted("import", "--from", directory, "--to", tmp_path / "kept")
    converted("import", "--from", directory, "--to", tmp_path / "wide", "--dtype", "float32")
    kept, wide = load_params(tmp_path / "kept"), load_params(tmp_path / "wide")
    for path, value in expected_params(model).items():
        rounded = value.astype(ml_dtypes.bfloat16)
        stored = np.float32 if path == "decoder.layers.mlp.up.kernel" else ml_dtypes.bfloat16
        assert kept[path].dtype == stored
        assert wide[path].dtype == np.float32
        np.testing.assert_array_equal(np.asarray(kept[path]).astype(np.float32), rounded.astype(np.float32))
        np.testing.assert_array_equal(wide[path], rounded.astype(np.float32))
    converted("export", "--from", tmp_path / "kept", "--to", tmp_path / "out")
    back = load_file(tmp_path / "out" / "model-00001-of-00001.safetensors")
    assert back["model.norm.weight"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(back["model.norm.weight"], half["model.norm.weight"])


def test_lm_head_that_copies_the_tied_embedding(hf_dirs, tmp_path, converted):
    model, source = hf_dirs("qwen2_tied")
    tensors = load_file(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    copy = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].copy()}
    out = converted("import", "--from", write_checkpoint(tmp_path / "copy", config, copy), "--to", tmp_path / "a")
    assert "1 tensors (lm_head, a copy of the tied embedding)" in out
    assert_same(load_params(tmp_path / "a"), expected_params(model))

    other = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}
    out = converted("import", "--from", write_checkpoint(tmp_path / "other", config, other), "--to", tmp_path / "b")
    assert "they are not tied" in out
    np.testing.assert_array_equal(load_params(tmp_path / "b")["decoder.lm_head.kernel"], other["lm_head.weight"].T)
    assert not read_sections(tmp_path / "b")["decoder"]["tie_word_embeddings"]


def truncated_tower(model) -> dict[str, np.ndarray]:
    expected = expected_params(model)
    kept = VISION["num_hidden_layers"] - 1
    return {path: v[:kept] if path.startswith("encoder.layers") else v for path, v in expected.items()}


@pytest.mark.parametrize("form", ["safetensors", "bin", "sharded bin"])
def test_llava_layout(form, hf_dirs, tmp_path, converted):
    model, _ = hf_dirs("onevision")
    _, siglip = hf_dirs("siglip_vision")
    config, tensors = llava_layout(model)
    directory = write_checkpoint(tmp_path / "llava", config, tensors)
    if form != "safetensors":
        (directory / "model.safetensors").unlink()
        state = {name: torch.from_numpy(np.array(t)) for name, t in tensors.items()}
        names = list(state)
        halves = [names[:20], names[20:]] if form == "sharded bin" else [names]
        files = ["pytorch_model.bin"] if form == "bin" else [f"pytorch_model-{k}.bin" for k in (1, 2)]
        for file, part in zip(files, halves, strict=True):
            torch.save({name: state[name] for name in part}, directory / file)
        if form == "sharded bin":
            weight_map = {name: file for file, part in zip(files, halves, strict=True) for name in part}
            (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    # The tower is in the checkpoint; --encoder only says what an unknown tower looks like.
    converted("import", "--from", directory, "--encoder", siglip, "--to", tmp_path / "ours")
    assert_same(load_params(tmp_path / "ours"), truncated_tower(model))
    config = read_config(tmp_path / "ours")
    assert (config.encoder.num_layers, config.vision_feature_layer) == (2, 2)
    assert config.image.grids == tuple((i, j) for i in (1, 2, 3) for j in (1, 2, 3))
    assert config.image.unpad_rounding == "truncate"

    converted("export", "--from", tmp_path / "ours", "--layout", "llava", "--to", tmp_path / "out")
    exported = load_file(tmp_path / "out" / "model-00001-of-00001.safetensors")
    assert_same(exported, tensors)
    converted("import", "--from", tmp_path / "out", "--to", tmp_path / "again")
    assert_same(load_params(tmp_path / "again"), load_params(tmp_path / "ours"))
    assert read_config(tmp_path / "again") == config


def test_llava_stage_1(hf_dirs, tmp_path, converted):
    """mm_projector.bin, completed by the SigLIP and the Qwen2 it was trained with."""
    model, _ = hf_dirs("onevision")
    config, tensors = llava_layout(model)
    stage1 = tmp_path / "stage1"
    stage1.mkdir()
    config |= {"mm_patch_merge_type": "flat", "image_aspect_ratio": "square"}
    (stage1 / "config.json").write_text(json.dumps(config))
    projector = {name: torch.from_numpy(t).bfloat16() for name, t in tensors.items() if "mm_projector" in name}
    torch.save(projector, stage1 / "mm_projector.bin")
    siglip, qwen2 = hf_dirs("siglip"), hf_dirs("qwen2")
    converted("import", "--from", stage1, "--encoder", siglip[1], "--decoder", qwen2[1], "--to", tmp_path / "ours")
    params = load_params(tmp_path / "ours")
    bfloat16 = ml_dtypes.bfloat16
    expected = expected_params(siglip[0]) | expected_params(qwen2[0])
    expected |= {p: v.astype(bfloat16) for p, v in expected_params(model).items() if p.startswith("projector.")}
    assert_same(params, expected)
    config = read_config(tmp_path / "ours")
    assert (config.encoder.num_layers, config.vision_feature_layer) == (3, 2)
    assert (config.image.aspect_ratio, config.image.unpad) == ("square", False)
    load_model(tmp_path / "ours")  # complete: no newline is read without unpad


def test_parts_for_phase_1(hf_dirs, tmp_path, converted):
    siglip, qwen2 = hf_dirs("siglip"), hf_dirs("qwen2_tied")
    converted("import", "--encoder", siglip[1], "--decoder", qwen2[1], "--to", tmp_path / "parts")
    assert_same(load_params(tmp_path / "parts"), expected_params(siglip[0]) | expected_params(qwen2[0]))
    assert set(read_sections(tmp_path / "parts")) == {"encoder", "decoder", "pixels"}


def test_onevision_runs_as_a_llava(hf_dirs, tmp_path, converted):
    """The imported directory is a complete model: nothing is initialised, nothing unused."""
    model, source = hf_dirs("onevision")
    converted("import", "--from", source, "--to", tmp_path / "ours")
    loaded = load_model(tmp_path / "ours")
    assert_same(merge_stages(params_of(loaded)), expected_params(model))


def test_sharded_safetensors(hf_dirs, tmp_path, converted):
    model, source = hf_dirs("onevision")
    directory = tmp_path / "hf"
    model.save_pretrained(directory, max_shard_size="20KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    converted("import", "--from", directory, "--to", tmp_path / "ours")
    assert_same(load_params(tmp_path / "ours"), expected_params(model))
    del source
    save_file({"stray": np.zeros(1, np.float32)}, directory / "stray.safetensors")  # the index does not list it
    converted("import", "--from", directory, "--to", tmp_path / "ours", "--overwrite")
