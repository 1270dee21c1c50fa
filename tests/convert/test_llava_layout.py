"""LLaVA's own layout with CLIP: it gives the model that transformers' layout of the same weights gives."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from tests.convert.conftest import transformers, weights_of, write_checkpoint
from tests.convert.llava_folder import TEXT, TOWER, Case, write_folder
from vr_jax.model_directory import load_params, read_config, read_generation, read_sections

# Fields of liuhaotian/llava-v1.5-7b and liuhaotian/llava-v1.6-mistral-7b beside those of the decoder.
OWN = {
    "freeze_mm_mlp_adapter": False,
    "image_aspect_ratio": "pad",
    "max_length": 4096,
    "mm_hidden_size": 16,
    "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None,
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-tiny",
    "tune_mm_mlp_adapter": False,
    "use_mm_proj": True,
    "image_crop_resolution": 224,
    "image_split_resolution": 224,
}
CLASSES = {
    "llama": ("LlavaLlamaForCausalLM", "llava", "vicuna_v1"),
    "mistral": ("LlavaMistralForCausalLM", "llava_mistral", "mistral_instruct"),
}


@pytest.fixture(scope="module", params=CLASSES)
def folders(request, tmp_path_factory):
    """The decoder, transformers' folder of a model, its folder in LLaVA's layout, and that of its encoder alone."""
    decoder = request.param
    directory = tmp_path_factory.mktemp("llava")
    write_folder(directory / "hf", Case("Llava", "clip", decoder, "pad"))
    model = transformers.LlavaForConditionalGeneration.from_pretrained(directory / "hf")
    tensors = {}
    for name, tensor in weights_of(model).items():
        name = name.removeprefix("model.")
        name = name.replace("vision_tower.", "model.vision_tower.vision_tower.vision_model.")
        name = name.replace("language_model.", "model.")
        name = name.replace("multi_modal_projector.linear_1", "model.mm_projector.0")
        tensors[name.replace("multi_modal_projector.linear_2", "model.mm_projector.2")] = tensor
    text = {name: value for name, value in model.config.text_config.to_dict().items() if name not in ("dtype",)}
    class_name, model_type, _ = CLASSES[decoder]
    config = {**text, **OWN, "architectures": [class_name], "model_type": model_type}
    write_checkpoint(directory / "llava", config, tensors)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / "llava" / name).write_bytes((directory / "hf" / name).read_bytes())
    model.model.vision_tower.save_pretrained(directory / "clip")
    return decoder, directory


def test_it_gives_the_model_of_transformers_layout(folders, tmp_path, converted):
    decoder, directory = folders
    converted("import", "--from", directory / "hf", "--to", tmp_path / "hf")
    out = converted("import", "--from", directory / "llava", "--encoder", directory / "clip", "--to", tmp_path / "own")
    expected, found = load_params(tmp_path / "hf"), load_params(tmp_path / "own")
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)
    first, own = read_config(tmp_path / "hf"), read_config(tmp_path / "own")
    same = {"image_token_id": None, "template": CLASSES[decoder][2]}
    image = dataclasses.replace(first.image, unpad_rounding=own.image.unpad_rounding)
    assert own == dataclasses.replace(first, image=image, **same)
    assert own.image.aspect_ratio == "pad"
    assert own.image.pad_colour == (122, 116, 104)
    assert own.vision_feature_layer == TOWER["num_hidden_layers"] - 1
    assert "with the mean (0.48145466" in out
    assert read_generation(tmp_path / "own").eos_token_ids == (2,)


def test_what_it_exports_is_read_again(folders, tmp_path, converted):
    _, directory = folders
    converted("import", "--from", directory / "llava", "--encoder", directory / "clip", "--to", tmp_path / "own")
    converted("export", "--from", tmp_path / "own", "--to", tmp_path / "out", "--layout=llava")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["architectures"] == ["LlavaLlamaForCausalLM"]  # a Mistral computes the same
    assert (written["image_aspect_ratio"], written["mm_vision_select_layer"]) == ("pad", -2)
    converted("import", "--from", tmp_path / "out", "--to", tmp_path / "again")
    assert read_sections(tmp_path / "again") == read_sections(tmp_path / "own")


def changed(directory, target, **changes):
    """A copy in LLaVA's layout with other fields; ... takes one away."""
    target.mkdir()
    values = json.loads((directory / "llava" / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))
    (target / "model.safetensors").symlink_to(directory / "llava" / "model.safetensors")
    return target


@pytest.mark.parametrize(
    ("changes", "mode", "level"),
    [
        ({"image_aspect_ratio": ...}, "crop", 3),  # CLIP's own processor makes the tile
        ({"image_aspect_ratio": "square", "mm_vision_select_layer": -1}, "crop", 4),
        ({"mm_vision_select_layer": 2}, "pad", 2),
    ],
)
def test_the_layer_and_the_mode_are_those_of_the_file(changes, mode, level, folders, tmp_path, converted):
    _, directory = folders
    source = changed(directory, tmp_path / "own", **changes)
    converted("import", "--from", source, "--encoder", directory / "clip", "--to", tmp_path / "out")
    config = read_config(tmp_path / "out")
    assert (config.image.aspect_ratio, config.vision_feature_layer) == (mode, level)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_vision_select_layer": ...}, "mm_vision_select_layer is absent; write the layer whose output"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature = 'cls_patch' is not supported"),
        ({"mm_projector_type": "linear"}, "mm_projector_type = 'linear' is not supported"),
        ({"image_aspect_ratio": "crop_split"}, "image aspect ratio 'crop_split': expected square, pad, anyres"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": ...}, "rope type 'linear'"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(changes, message, folders, tmp_path, convert):
    _, directory = folders
    source = changed(directory, tmp_path / "own", **changes)
    status, _, err = convert("import", "--from", source, "--encoder", directory / "clip", "--to", tmp_path / "out")
    assert (status, err.count("\n")) == (2, 1)
    assert message in err


def test_an_encoder_that_the_folder_lacks_is_asked_for_by_its_name(folders, tmp_path, convert, converted):
    """liuhaotian/llava-v1.5-7b names CLIP and does not hold it."""
    _, directory = folders
    model = transformers.LlavaForConditionalGeneration.from_pretrained(directory / "hf")
    tensors = {
        name.removeprefix("model.").replace("language_model.", "model."): tensor
        for name, tensor in weights_of(model).items()
        if "vision_tower" not in name and "projector" not in name
    }
    for number, theirs in ((1, "0"), (2, "2")):
        for kind in ("weight", "bias"):
            tensor = weights_of(model)[f"model.multi_modal_projector.linear_{number}.{kind}"]
            tensors[f"model.mm_projector.{theirs}.{kind}"] = tensor
    config = json.loads((directory / "llava" / "config.json").read_text())
    source = write_checkpoint(tmp_path / "own", config, tensors)
    status, _, err = convert("import", "--from", source, "--to", tmp_path / "out")
    assert status == 2
    assert "holds no encoder; give that it was trained with: --encoder DIR" in err
    assert "names openai/clip-tiny)" in err
    converted("import", "--from", source, "--encoder", directory / "clip", "--to", tmp_path / "out")
    assert load_params(tmp_path / "out")["encoder.class_embedding"].shape == (TOWER["hidden_size"],)
    assert read_config(tmp_path / "out").decoder.num_layers == TEXT["num_hidden_layers"]
