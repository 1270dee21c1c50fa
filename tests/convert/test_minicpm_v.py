"""MiniCPM-V 2.0 in the layout of its remote code: names and shapes, tiny models through files, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.convert.conftest import write_checkpoint
from tests.convert.minicpm_folder import (
    config_json,
    conversation,
    describe_tower,
    preprocessor_json,
    whole_cases,
    write_folder,
)
from tests.golden.discovery import documents
from tests.tiny import random_model
from vr_jax.convert.formats import MINICPM_V
from vr_jax.convert.importing import abstract_params, import_checkpoint, plan_import
from vr_jax.convert.minicpm_fields import MINICPM_FIELDS
from vr_jax.convert.minicpm_v import read_minicpm, read_minicpm_v
from vr_jax.convert.minicpm_writing import write_minicpm, write_minicpm_v
from vr_jax.convert.tables import slots
from vr_jax.errors import UserError
from vr_jax.inference import Generator, load_for_inference
from vr_jax.model.batch import NO_CELL
from vr_jax.model.config import VlmConfig
from vr_jax.model.decoders.transformer import TransformerConfig
from vr_jax.model.refusion.vision_remember import VisionRememberConfig
from vr_jax.model_directory import load_params, read_config, read_sections, save_model
from vr_jax.model_directory.comparison import config_differences
from vr_jax.settings import load_config


def layouts() -> list:
    found = [
        pytest.param(document, id=path.stem)
        for path, document in documents("minicpm_v")
        if "names_and_shapes" in document
    ]
    return found or [pytest.param(None, id="absent", marks=pytest.mark.skip(reason="no recorded 'minicpm_v'"))]


def foreign_shapes(config: VlmConfig) -> dict[str, list[int]]:
    """Names and shapes of the tensors that an export of a model writes."""
    sections, params = config.to_dict(), abstract_params(config.to_dict())
    del params["image_newline"]
    found = slots(MINICPM_V.table(MINICPM_V.tables, sections), params)
    computed = {name: compute(sections).shape for name, compute in MINICPM_V.computed.items()}
    return {name: list(shape) for name, shape in ({n: one.shape for n, one in found.items()} | computed).items()}


@pytest.mark.parametrize("layout", layouts())
def test_the_published_checkpoint_has_a_place_for_every_tensor(layout):
    """694 names and shapes, and 3,434,965,792 parameters, of the published config.json; nothing is allocated."""
    config = read_minicpm_v(layout["config.json"], "config.json")
    found = foreign_shapes(config)
    assert found == layout["names_and_shapes"]
    assert sum(math.prod(shape) for shape in found.values()) == layout["parameters"]
    assert config.decoder.residual_scale == pytest.approx(1.4 / math.sqrt(40), rel=1e-15)
    assert (config.decoder.embedding_scale, config.decoder.logit_scale) == (12, 256 / 2304)
    assert (config.cells_per_tile, config.image.max_tiles_per_image, config.image.tile_size) == (64, 10, 476)


@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("name", ["minicpm_v", "minicpm_v_vr"])
@pytest.mark.parametrize("phase", ["phase1", "phase2"])
def test_the_configs_of_table_6_start_from_the_published_model(name, phase, layout):
    """No field of a section whose parameters are taken differs from that of the imported folder."""
    stored = read_minicpm_v(layout["config.json"], "config.json").to_dict()
    config = load_config(f"configs/table6/{name}.py:{phase}").model
    assert config_differences(stored, config, ("encoder.x", "decoder.x", "projector.x")) == []
    assert config.template == stored["template"]


@pytest.mark.parametrize("layout", layouts())
def test_an_export_has_the_fields_of_the_published_folder(layout):
    """But for where the code is found, and for fields without a meaning here, config.json is the published one."""
    config = read_minicpm_v(layout["config.json"], "config.json")
    values, processor = write_minicpm_v(config)
    own = {"auto_map", "_name_or_path", "attention_dropout", "bos_token_id", "eos_token_id", "initializer_range"}
    own |= {"pretraining_tp", "torch_dtype", "transformers_version", "processor_class"}

    def kept(fields):
        return {name: value for name, value in fields.items() if name not in own}

    assert kept(values) == kept(layout["config.json"])
    assert kept(processor) == kept(layout["preprocessor_config.json"])
    assert read_minicpm_v(values, "config.json") == config


@pytest.mark.slow  # It compiles generation.
@pytest.mark.parametrize("case", whole_cases())
def test_a_folder_answers_as_recorded_and_returns_unchanged(case, tmp_path, converted, monkeypatch):
    """Import, the recorded question with its images through processor and generator, export, and import again."""
    describe_tower(case, monkeypatch)
    folder = write_folder(tmp_path / "theirs", case)
    report = converted("import", f"--from={folder}", f"--to={tmp_path / 'ours'}")
    assert f"{len(case.weights) - 1} tensors imported" in report  # all but the computed positions
    loaded = load_for_inference(tmp_path / "ours")
    assert loaded.model.config.template == "minicpm_v"
    prompt = loaded.processor.prompt(conversation(case))
    np.testing.assert_array_equal(prompt.tokens, case.inputs["input_ids"][0])
    bounds = case.inputs["image_bounds"]
    vision = np.zeros(len(prompt.tokens), bool)
    for begin, end in bounds.tolist():
        vision[begin:end] = True
    np.testing.assert_array_equal(prompt.vision_cell != NO_CELL, vision)
    np.testing.assert_array_equal(prompt.vision_cell[vision], np.arange(len(bounds) * case.config["query_num"]))
    np.testing.assert_array_equal(prompt.tile_extent, case.config["slice_grids_hw"])
    generator = Generator(loaded.model, loaded.tokenizer, settings=loaded.generation)
    expected = case.outputs["greedy_tokens"].tolist()
    (reply,) = generator.generate([prompt], max_new_tokens=len(expected))
    assert list(reply.tokens) == expected

    converted("export", f"--from={tmp_path / 'ours'}", f"--to={tmp_path / 'back'}")
    written = {name: x for file in (tmp_path / "back").glob("*.safetensors") for name, x in load_file(file).items()}
    assert written.keys() == case.weights.keys()
    for name, tensor in case.weights.items():
        tolerance = 1e-6 if name in MINICPM_V.computed else 0  # the official sines are computed in float32
        np.testing.assert_allclose(written[name], tensor, rtol=0, atol=tolerance, err_msg=name)
    converted("import", f"--from={tmp_path / 'back'}", f"--to={tmp_path / 'again'}")
    assert read_config(tmp_path / "again") == read_config(tmp_path / "ours")
    first, second = (load_params(tmp_path / name) for name in ("ours", "again"))
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[path], second[path]) for path in first)


@pytest.fixture(scope="module")
def case():
    found = whole_cases()[0].values[0]
    if found is None:
        pytest.skip("no recorded 'minicpm_v'")
    return found


def fields(case, **changes):
    return {name: value for name, value in (config_json(case) | changes).items() if value is not None}


REFUSED = {
    "absent slicing": ({"max_slice_nums": None}, "the field 'max_slice_nums' is absent"),
    "absent size of slices": ({"scale_resolution": None}, "the field 'scale_resolution' is absent"),
    "absent mode": ({"slice_mode": None}, "the field 'slice_mode' is absent"),
    "absent scale": ({"scale_depth": None}, "the field 'scale_depth' is absent"),
    "images not cut": ({"slice_mode": False}, "slice_mode = False is not supported, expected True"),
    "queries without a grid": ({"query_num": 60}, "query_num = 60 is not supported, expected a square number"),
    "queries of no number": ({"query_num": "64"}, r"query_num = '64': expected a whole number > 0"),
    "width of the resampler": (
        {"hidden_size": 34, "num_attention_heads": 2, "num_key_value_heads": 2},
        "projector.heads = 4 does not divide the decoder's width 34",
    ),
    "another tower": ({"vision_encoder": "eva02"}, "vision_encoder = 'eva02' is not known; known: vit_so400m"),
    "patches of another tower": ({"patch_size": 16}, "patch_size = 16 does not fit the vision tower"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4} is not supported"),
    "rope scaling": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling = {'type': 'linear'"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported, expected 'silu'"),
    "biases": ({"attention_bias": True}, "attention_bias = True is not supported, expected False"),
    "MiniCPM-V 2.6": ({"version": 2.6}, "version = 2.6: MiniCPM-V 2.5 and later have this field"),
    "MiniCPM-V 2.5": (
        {"slice_config": {"model_type": "minicpmv", "max_slice_nums": 9}},
        "slice_config = .* MiniCPM-V 2.5 and later have this field",
    ),
    "MiniCPM-V 4": ({"vision_config": {"model_type": "siglip"}}, "vision_config = .* expected the config.json of"),
    "an unknown field": ({"sparse_config": {"topk": 8}}, "the field 'sparse_config' = .* is not known"),
    "sliding window": ({"sliding_window": 128}, "the field 'sliding_window' = 128 is not known"),
    "damaged vr_jax": ({"vr_jax": {"encoder": 3}}, "vr_jax"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_computed_is_refused_by_name(what, case, monkeypatch):
    describe_tower(case, monkeypatch)
    changes, message = REFUSED[what]
    read_minicpm_v(fields(case), "config.json")
    with pytest.raises(UserError, match=message) as error:
        read_minicpm_v(fields(case, **changes), "config.json")
    assert str(error.value).startswith("config.json: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_slice_nums": 6}, "max_slice_nums = 6 does not fit config.json, whose model has 9"),
        ({"scale_resolution": 448}, "scale_resolution = 448 does not fit config.json, whose model has 70"),
        ({"image_feature_size": 64}, "image_feature_size = 64 does not fit config.json, whose model has 9"),
        ({"image_processor_type": "SiglipImageProcessor"}, "image_processor_type = 'SiglipImageProcessor' does not"),
        ({"im_start": "<img>"}, "im_start = '<img>' is not supported, expected '<image>'"),
        ({"use_image_id": True}, "the field 'use_image_id' = True is not known"),
        ({"norm_std": [0.5, 0.5, 0.0]}, "image_std"),
        ({"norm_mean": 0.5}, "norm_mean = 0.5: expected"),
    ],
)
def test_a_processor_that_does_something_else_is_refused(changes, message, case, tmp_path, monkeypatch):
    describe_tower(case, monkeypatch)
    folder = write_folder(tmp_path, case)
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(preprocessor_json(case) | changes))
    with pytest.raises(UserError, match=message) as error:
        plan_import(folder)
    assert str(error.value).startswith(f"{path}: ")


def test_the_mean_of_the_processor_becomes_that_of_the_model(case, tmp_path, monkeypatch):
    describe_tower(case, monkeypatch)
    folder = write_folder(tmp_path, case)
    changes = {"norm_mean": [0.1, 0.2, 0.3], "norm_std": [0.4, 0.5, 0.6]}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor_json(case) | changes))
    image = plan_import(folder)["image"]
    assert (image["image_mean"], image["image_std"]) == (changes["norm_mean"], changes["norm_std"])


def test_tokens_of_markers_have_the_ids_of_config_json(case, tmp_path, monkeypatch):
    """The remote code finds images by these ids, and we by the texts of the tokens."""
    describe_tower(case, monkeypatch)
    folder = write_folder(tmp_path, case, im_start_token_id=101, slice_end_token_id=112)
    plan_import(folder)
    write_folder(tmp_path, case, slice_end_token_id=113)
    with pytest.raises(UserError, match=r"'</slice>' has the id 113, but .*tokenizer\.json gives it the id 112"):
        plan_import(folder)


def test_tensors_that_do_not_fit_are_listed(case, tmp_path, convert, monkeypatch):
    """A pooling head is left out with its reason; positions of other queries, and a missing block, stop the import."""
    describe_tower(case, monkeypatch)
    weights = {**case.weights, "vpm.attn_pool.latent": np.zeros((1, 1, 16), np.float32)}

    def write(tensors):
        folder = write_folder(tmp_path / "theirs", case)
        save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, folder / "model.safetensors")
        return convert("import", f"--from={folder}", f"--to={tmp_path / 'ours'}", "--overwrite")

    status, out, _ = write(weights)
    assert status == 0
    assert "ignored on purpose: 1 tensors (the pooling head of the vision tower" in out
    status, _, err = write(weights | {"resampler.pos_embed": 0.9 * weights["resampler.pos_embed"]})
    assert status == 2
    assert "resampler.pos_embed differs by 0.1 from the constants that are computed in its place" in err
    status, _, err = write(weights | {"resampler.pos_embed": weights["resampler.pos_embed"][:4]})
    assert status == 2
    assert "resampler.pos_embed has the shape (4, 32), expected (9, 32)" in err
    status, _, err = write({name: x for name, x in weights.items() if "blocks.2" not in name})
    assert status == 2
    assert "missing     vpm.blocks.2.attn.qkv.weight: expected (48, 16)" in err


@pytest.mark.slow  # It makes the parameters of models and writes them; tests/convert/test_tables.py compares others.
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_vision_remember_in_a_minicpm_v_returns_unchanged(dtype, case, tmp_path, converted, monkeypatch):
    """The remote code has no fields for it, so that `vr_jax` in config.json holds the model's config."""
    describe_tower(case, monkeypatch)
    config = dataclasses.replace(
        read_minicpm_v(fields(case), "config.json"),
        refusion=VisionRememberConfig(insert_after=(1, 3), levels=(1, 2, 3), cross_heads=4),
        dtype=dtype,
    )
    model = random_model(config)
    if dtype == "bfloat16":
        model = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
    save_model(tmp_path / "ours", model)
    converted("export", f"--from={tmp_path / 'ours'}", f"--to={tmp_path / 'theirs'}")
    written = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert written["architectures"] == ["MiniCPMV"]
    assert written["torch_dtype"] == dtype
    names = {name for file in (tmp_path / "theirs").glob("*.safetensors") for name in load_file(file)}
    assert case.weights.keys() < names
    assert all(name.startswith("vision_remember.") for name in names - case.weights.keys())
    converted("import", f"--from={tmp_path / 'theirs'}", f"--to={tmp_path / 'again'}")
    assert read_config(tmp_path / "again") == config
    first, second = (load_params(tmp_path / name) for name in ("ours", "again"))
    first.pop("image_newline")  # No image of such a model has one.
    assert first.keys() == second.keys()
    for path in first:
        assert first[path].dtype == second[path].dtype
        np.testing.assert_array_equal(first[path], second[path])


def test_no_layout_of_llava_has_a_place_for_it(case, tmp_path, convert, monkeypatch):
    describe_tower(case, monkeypatch)
    save_model(tmp_path / "ours", random_model(read_minicpm_v(fields(case), "config.json")))
    status, _, err = convert("export", f"--from={tmp_path / 'ours'}", f"--to={tmp_path / 'theirs'}", "--layout=llava")
    assert status == 2
    assert "LLaVA's layout has no place for the encoder 'siglip_slices'" in err


def test_the_decoder_alone_is_a_minicpm(case, tmp_path, converted):
    """MiniCPMForCausalLM: import, export with the three scales as they were written, and import again."""
    values = fields(case) | {"architectures": ["MiniCPMForCausalLM"], "model_type": "minicpm"}
    values = {name: value for name, value in values.items() if name in MINICPM_FIELDS.known}
    tensors = {name.removeprefix("llm."): x for name, x in case.weights.items() if name.startswith("llm.")}
    folder = write_checkpoint(tmp_path / "theirs", values, tensors)
    converted("import", f"--from={folder}", f"--to={tmp_path / 'ours'}")
    converted("export", f"--from={tmp_path / 'ours'}", f"--to={tmp_path / 'back'}")
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {name: written[name] for name in ("scale_emb", "scale_depth", "dim_model_base")} == {
        "scale_emb": 12,
        "scale_depth": 1.4,
        "dim_model_base": 8,
    }
    assert read_minicpm(written, "config.json") == read_minicpm(values, "config.json")
    found = {name: x for file in (tmp_path / "back").glob("*.safetensors") for name, x in load_file(file).items()}
    assert found.keys() == tensors.keys()
    assert all(np.array_equal(found[name], tensors[name]) for name in tensors)


def test_parts_of_the_model_are_read_alone(case, tmp_path, monkeypatch):
    """`--encoder` and `--decoder` take one part of a MiniCPM-V each; the resampler's constants are left out."""
    describe_tower(case, monkeypatch)
    folder = write_checkpoint(tmp_path / "theirs", fields(case), case.weights)
    import_checkpoint(None, tmp_path / "parts", encoder=folder, decoder=folder, ignore=())
    found, sections = load_params(tmp_path / "parts"), read_sections(tmp_path / "parts")
    assert {path.split(".")[0] for path in found} == {"encoder", "decoder"}
    config = read_minicpm_v(fields(case), "config.json")
    assert sections["encoder"] == config.encoder.to_dict()
    assert sections["decoder"] == config.decoder.to_dict()
    blocks = [x for name, x in case.weights.items() if name.startswith("vpm.blocks.0.norm1.weight")]
    (scale,) = (array for path, array in found.items() if path.endswith("norm1.scale"))
    np.testing.assert_array_equal(np.asarray(scale)[0], blocks[0])


def test_a_decoder_that_is_no_minicpm_has_no_such_format():
    with pytest.raises(UserError, match="query_key_norm = True; MiniCPM has False"):
        write_minicpm(TransformerConfig(attention_bias=False, query_key_norm=True))
