"""Which files of a foreign folder count, and what their fields do."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.convert.conftest import VISION, llava_layout, torch, write_checkpoint
from vr_jax.convert.encoder_configs import SIGLIP_FAMILY
from vr_jax.convert.folder import read_folder
from vr_jax.convert.folder_settings import encoder_pixels, with_processor
from vr_jax.convert.preprocessing import CLIP_MEAN, CLIP_STD
from vr_jax.convert.weights import Checkpoint
from vr_jax.errors import UserError
from vr_jax.model.config import ImageConfig, VlmConfig
from vr_jax.model.encoders.siglip import SiglipConfig
from vr_jax.model.projectors.mlp import MlpConfig
from vr_jax.model_directory import load_params, read_config, read_generation, read_sections

SIDE = VISION["image_size"]
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]]
MODEL = VlmConfig(
    encoder=SiglipConfig(
        hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, image_size=SIDE, patch_size=4
    ),
    projector=MlpConfig(),
    image=ImageConfig(tile_size=SIDE, grids=((2, 1), (1, 2))),
    vision_feature_layer=2,
    image_token_id=39,
)
COMPLETE = {"size": {"height": SIDE, "width": SIDE}, "image_grid_pinpoints": PINPOINTS}


def folder(tmp_path, files=None, ignored=()):
    """Reads a folder with a weight file of one number and some JSON files."""
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    for name, values in {"config.json": {}, **(files or {})}.items():
        (tmp_path / name).write_text(json.dumps(values))
    return read_folder(tmp_path, ignored)


def processed(tmp_path, processor, model=MODEL, ignored=(), **files):
    """The image settings that a preprocessor_config.json gives."""
    found = folder(tmp_path, {"preprocessor_config.json": processor, **files}, ignored)
    return with_processor(model, found, lambda line: None).image


def test_weight_files_are_taken_in_the_order_of_transformers(tmp_path):
    names = ("model.safetensors", "model-00001-of-00001.safetensors", "stray.safetensors")
    for number, name in enumerate(names):
        save_file({"x": np.full(1, number, np.float32)}, tmp_path / name)
    index = {"weight_map": {"x": names[1]}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.save({"x": torch.full((1,), 9.0)}, tmp_path / "pytorch_model.bin")
    for expected in (0, 1, 9):
        checkpoint = Checkpoint(tmp_path)
        ((_, value),) = checkpoint.read({"x": None})
        assert value == expected
        for file in checkpoint.files:
            file.unlink()
        if expected == 1:
            (tmp_path / "model.safetensors.index.json").unlink()


@pytest.mark.parametrize("place", ["../model.safetensors", "/etc/passwd", 3, "", None])
def test_an_index_names_files_beside_it(place, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": place}}))
    with pytest.raises(UserError, match=r"weight_map\['x'\] = .*: expected the name of a file beside it"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_beside_the_weights_is_refused_by_name(name, tmp_path):
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=f"{name} is an adapter, .*; give the model that it was trained on with --base"):
        folder(tmp_path)
    folder(tmp_path, ignored=[name])


def test_what_the_processor_leaves_out_is_the_default_of_its_class(tmp_path):
    image = processed(tmp_path, COMPLETE)
    assert (image.image_mean, image.image_std) == (CLIP_MEAN, CLIP_STD)
    assert (image.resample, image.rescale_factor) == ("bicubic", 1 / 255)


def test_pixels_are_those_of_the_file(tmp_path):
    given = {"image_mean": [0.1, 0.2, 0.3], "image_std": 0.4, "resample": 2, "rescale_factor": 0.01}
    image = processed(tmp_path, COMPLETE | given)
    assert (image.image_mean, image.image_std) == ((0.1, 0.2, 0.3), (0.4, 0.4, 0.4))
    assert (image.resample, image.rescale_factor) == ("bilinear", 0.01)
    assert image.pad_colour == (25, 51, 76)


@pytest.mark.parametrize("name", ["generation_config.json", "preprocessor_config.json"])
def test_a_link_to_a_file_that_is_missing_is_refused(name, tmp_path):
    """A cache of the hub holds such links where its files were removed."""
    (tmp_path / name).symlink_to("../blobs/0")
    with pytest.raises(UserError, match=rf"{name} is a link to \.\./blobs/0, which is missing; download it again"):
        folder(tmp_path)


def test_a_key_that_stands_twice_is_refused(tmp_path):
    folder(tmp_path)
    (tmp_path / "config.json").write_text('{"vision_feature_layer": -1, "vision_feature_layer": -2}')
    with pytest.raises(UserError, match=r"config\.json is not valid JSON: it has the key 'vision_feature_layer' twice"):
        read_folder(tmp_path)


def test_a_processor_inside_processor_config_comes_first(tmp_path):
    nested = {"image_processor": COMPLETE | {"image_mean": [0.7, 0.7, 0.7]}, "num_image_tokens": MODEL.cells_per_tile}
    image = processed(tmp_path, COMPLETE | {"image_mean": [0.1] * 3}, **{"processor_config.json": nested})
    assert image.image_mean == (0.7, 0.7, 0.7)


def test_without_a_processor_pixels_are_siglips_and_a_line_says_so(tmp_path):
    lines = []
    assert with_processor(MODEL, folder(tmp_path), lines.append) == MODEL
    assert len(lines) == 1
    assert "has no preprocessor_config.json" in lines[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": {"height": 30, "width": 30}}, "size = .* 30 x 30 pixels, but the encoder's image_size is 24"),
        ({"size": None}, "size is absent, and its class takes 384 x 384 pixels"),
        ({"size": {"shortest_edge": 24, "longest_edge": 48}}, "size = .*: expected the fields height and width"),
        ({"size": {"height": "24", "width": 24}}, "size = .*: expected whole numbers of pixels"),
        ({"crop_size": {"height": 20, "width": 20}}, "crop_size = .* 20 x 20 pixels"),
        ({"do_resize": False}, "do_resize = False is not supported, expected True"),
        ({"do_rescale": False}, "do_rescale = False is not supported"),
        ({"do_normalize": False}, "do_normalize = False is not supported"),
        ({"do_convert_rgb": False}, "do_convert_rgb = False is not supported"),
        ({"pad_size": {"height": 9, "width": 9}}, "pad_size = .* is not supported"),
        ({"resample": 7}, "resample = 7: expected the number of a filter of Pillow"),
        ({"resample": True}, "resample = True: expected the number of a filter"),
        ({"rescale_factor": 0}, "rescale_factor = 0: expected a number > 0"),
        ({"rescale_factor": float("nan")}, "rescale_factor = nan: expected a number > 0"),
        ({"image_mean": [0.5, 0.5]}, "image_mean = .*: expected"),
        ({"image_std": [0.5, 0.0, 0.5]}, "image_std = .*: expected"),
        ({"image_mean": "half"}, "image_mean = .*: expected"),
        ({"image_grid_pinpoints": None}, "image_grid_pinpoints = .* differs from that of config.json"),
        ({"image_grid_pinpoints": [[24, 48]]}, "image_grid_pinpoints = .* differs from that of config.json"),
        ({"image_processor_type": "CLIPImageProcessor"}, "image_processor_type = 'CLIPImageProcessor'"),
        ({"do_flip_channel_order": True}, "the field 'do_flip_channel_order' = True is not known"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(change, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        processed(tmp_path, COMPLETE | change)
    assert "preprocessor_config.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_refused_field_can_be_left_out_by_name(tmp_path):
    image = processed(tmp_path, COMPLETE | {"do_flip_channel_order": True}, ignored=["do_flip_channel_order"])
    assert image.image_mean == CLIP_MEAN


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_image_tokens": 576}, "num_image_tokens = 576 does not fit the model's 36"),
        ({"vision_feature_select_strategy": "default"}, "vision_feature_select_strategy = 'default' does not fit"),
        ({"vision_aspect_ratio": "anyres_max_4"}, "vision_aspect_ratio = 'anyres_max_4' does not fit"),
        ({"num_additional_image_tokens": 1}, "num_additional_image_tokens = 1 does not fit the model's 0"),
        ({"image_processor": 3}, "image_processor = 3: expected an object"),
    ],
)
def test_a_processor_that_does_not_fit_the_model(values, message, tmp_path):
    with pytest.raises(UserError, match=message):
        processed(tmp_path, COMPLETE, **{"processor_config.json": values})


def test_an_image_token_of_another_id_is_refused(tmp_path):
    tokenizer = {"added_tokens": [{"id": 7, "content": "<image>"}]}
    with pytest.raises(UserError, match=r"image_token_index = 39, but .*tokenizer.json gives '<image>' the id 7"):
        processed(tmp_path, COMPLETE, **{"tokenizer.json": tokenizer})


def test_an_encoder_keeps_the_pixels_of_its_processor(tmp_path):
    given = {"image_processor_type": "SiglipImageProcessorFast", "size": {"height": SIDE, "width": SIDE}}
    found = folder(tmp_path, {"preprocessor_config.json": given | {"image_mean": [0.4] * 3}})
    pixels = encoder_pixels(found, SIGLIP_FAMILY, SIDE, lambda line: None)
    assert pixels == {"image_mean": [0.4] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255, "resample": "bicubic"}


# Whole imports


def change(directory, file, **values):
    path = directory / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))


def test_an_encoder_brings_no_tokenizer(hf_dirs, tmp_path, converted):
    """Every SigLIP folder has the tokenizer of its text tower, here one whose class cannot even be imported."""
    source = tmp_path / "siglip"
    shutil.copytree(hf_dirs("siglip")[1], source)
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "SiglipTokenizer"}')
    (source / "spiece.model").write_text("")
    processor = {"image_processor_type": "SiglipImageProcessor", "size": {"height": SIDE, "width": SIDE}}
    change(source, "preprocessor_config.json", **processor, image_std=[0.25] * 3)
    converted("import", "--from", source, "--to", tmp_path / "encoder")
    assert sorted(path.name for path in (tmp_path / "encoder").iterdir()) == ["_COMPLETE", "config.json", "params"]
    assert read_sections(tmp_path / "encoder")["pixels"]["image_std"] == [0.25] * 3
    converted("export", "--from", tmp_path / "encoder", "--to", tmp_path / "back")
    exported = json.loads((tmp_path / "back" / "preprocessor_config.json").read_text())
    assert (exported["image_std"], exported["size"]) == ([0.25] * 3, {"height": SIDE, "width": SIDE})


def test_the_ends_of_a_reply_come_from_config_json_where_there_is_no_other_file(hf_dirs, tmp_path, converted):
    source = tmp_path / "hf"
    shutil.copytree(hf_dirs("qwen2")[1], source)
    (source / "generation_config.json").unlink(missing_ok=True)
    change(source, "config.json", eos_token_id=[3, 5])
    converted("import", "--from", source, "--to", tmp_path / "a")
    assert read_generation(tmp_path / "a").eos_token_ids == (3, 5)
    change(source, "generation_config.json", eos_token_id=7, repetition_penalty=1.1)
    converted("import", "--from", source, "--to", tmp_path / "b")
    found = read_generation(tmp_path / "b")
    assert (found.eos_token_ids, found.repetition_penalty) == ((7,), 1.1)


def test_generation_settings_that_are_not_computed_are_refused_by_name(hf_dirs, tmp_path, convert, converted):
    source = tmp_path / "hf"
    shutil.copytree(hf_dirs("qwen2")[1], source)
    change(source, "generation_config.json", num_beams=4, eos_token_id=1)
    status, _, err = convert("import", "--from", source, "--to", tmp_path / "out")
    assert status == 2
    assert f"{source / 'generation_config.json'}: num_beams = 4 is not supported, expected 1" in err
    converted("import", "--from", source, "--to", tmp_path / "out", "--ignore=num_beams")
    assert read_generation(tmp_path / "out").eos_token_ids == (1,)


@pytest.mark.parametrize("prefix", ["", "module.", "base_model.model.", "base_model.model.model.", "_orig_mod.module."])
def test_a_first_stage_is_told_by_its_fields_or_by_its_only_file(prefix, hf_dirs, tmp_path, converted):
    """LLaVA's first stage names the language model it began with; its tensors may have the prefix of a wrapper."""
    config, tensors = llava_layout(hf_dirs("onevision")[0])
    config |= {"mm_patch_merge_type": "flat", "image_aspect_ratio": "square"}
    config["architectures"] = ["Qwen2ForCausalLM"]
    if prefix == "module.":  # told by its only file
        config = {name: value for name, value in config.items() if not name.startswith("mm_")}
    stage1 = tmp_path / "stage1"
    stage1.mkdir()
    (stage1 / "config.json").write_text(json.dumps(config))
    names = {name: tensor for name, tensor in tensors.items() if "mm_projector" in name}
    short = {name.removeprefix("model.") if prefix.endswith("model.model.") else name: t for name, t in names.items()}
    torch.save({prefix + name: torch.from_numpy(t) for name, t in short.items()}, stage1 / "mm_projector.bin")
    siglip, qwen2 = hf_dirs("siglip")[1], hf_dirs("qwen2")[1]
    out = converted("import", "--from", stage1, "--encoder", siglip, "--decoder", qwen2, "--to", tmp_path / "ours")
    assert ("had the prefix of a wrapper" in out) == (prefix != "")
    expected = tensors["model.mm_projector.0.weight"].T
    np.testing.assert_array_equal(load_params(tmp_path / "ours")["projector.fc1.kernel"], expected)
    assert read_config(tmp_path / "ours").image_token_id is None


def test_adapter_tensors_are_refused_by_name(hf_dirs, tmp_path, convert):
    source = hf_dirs("qwen2")[1]
    tensors = load_file(source / "model.safetensors")
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"] = np.zeros((2, 24), np.float32)
    config = json.loads((source / "config.json").read_text())
    status, _, err = convert(
        "import", "--from", write_checkpoint(tmp_path / "hf", config, tensors), "--to", tmp_path / "out"
    )
    assert status == 2
    assert "lora_A.weight, a tensor of an adapter; merge the adapter" in err
