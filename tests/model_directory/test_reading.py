"""What was saved is what is loaded: on any mesh, with re-fusion blocks elsewhere, as a part or as a warm start."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.model_directory.conftest import abstract
from tests.tiny import params_of, quick, randomized, tiny_config, tiny_decoder, tiny_encoder, tiny_refusion
from vr_jax.errors import UserError
from vr_jax.model.parameters import flatten_params, merge_stages
from vr_jax.model.vlm import VisionLanguageModel
from vr_jax.model_directory import (
    load_model,
    load_params,
    read_config,
    save_model,
    save_params,
    stored_params,
    warm_start,
)
from vr_jax.sharding import make_mesh

CONFIG = tiny_config()


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


def test_round_trip(saved, model):
    assert sorted(p.name for p in saved.iterdir()) == ["_COMPLETE", "config.json", "params", "tokenizer.json"]
    assert read_config(saved) == CONFIG
    loaded = load_model(saved)
    assert loaded.config == CONFIG
    assert_same(params_of(loaded), params_of(model))


@pytest.mark.parametrize("axes", quick([{"fsdp": 8}, {"replica": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2}], {"fsdp": 2}))
def test_restores_into_the_shards_of_any_mesh(saved, model, axes):
    mesh = make_mesh(**axes, devices=jax.devices()[: int(np.prod(list(axes.values())))])
    loaded = load_model(saved, mesh)
    kernel = flatten_params(loaded)["decoder.stages.1.mlp.up.kernel"]
    assert kernel.sharding.mesh == mesh
    assert kernel.sharding.spec[1] == "fsdp"
    assert_same(params_of(loaded), params_of(model))


def test_saves_from_a_sharded_model(saved, model, tmp_path):
    save_model(tmp_path / "again", load_model(saved, make_mesh(fsdp=8)))
    assert_same(params_of(load_model(tmp_path / "again")), params_of(model))


def test_moving_the_refusion_keeps_every_layer(saved, model):
    moved = tiny_config(refusion=tiny_refusion(insert_after=(2, 3), levels=(1, 2, 3)))
    loaded = load_model(saved, config=moved)
    assert [s.input_norm.scale.shape[0] for s in loaded.decoder.stages] == [2, 1, 1]
    assert_same(merge_stages(params_of(loaded)), merge_stages(params_of(model)))


def test_dtype_by_path(saved, model):
    half = lambda path: jnp.bfloat16 if path.startswith("encoder.") else jnp.float32  # noqa: E731
    loaded = flatten_params(load_model(saved, dtype=half))
    expected = params_of(model)
    for path, array in loaded.items():
        wanted = jnp.bfloat16 if path.startswith("encoder.") else jnp.float32
        assert array.dtype == wanted, path
        np.testing.assert_array_equal(np.asarray(array), expected[path].astype(wanted))
    assert flatten_params(load_model(saved, dtype=jnp.bfloat16))["image_newline"].dtype == jnp.bfloat16


def test_warm_start_adds_what_the_config_adds(tmp_path):
    """Baseline -> LLaVA-VR: the re-fusion blocks are initialised as the constructor would, and reported."""
    changes = {"encoder": tiny_encoder(num_layers=1), "decoder": tiny_decoder(num_layers=2), "vision_feature_layer": 1}
    remember = tiny_config(refusion=tiny_refusion(insert_after=(1,), levels=(1,)), **changes)
    baseline = randomized(abstract(tiny_config(refusion=None, **changes)), seed=3)
    save_model(tmp_path / "baseline", baseline)
    with pytest.raises(UserError, match=r"lacks \d+ parameters(.|\n)*refusion.blocks.0.ln_q.scale"):
        load_model(tmp_path / "baseline", config=remember)
    started, report = warm_start([tmp_path / "baseline"], remember, make_mesh(fsdp=8), seed=5)
    made = jax.jit(lambda: VisionLanguageModel(remember, rngs=nnx.Rngs(5)).refusion)()
    fresh = {f"refusion.{path}": array for path, array in params_of(made).items()}
    kept = merge_stages(params_of(baseline))
    found = merge_stages(params_of(started))
    assert set(report.initialised) == set(fresh)
    assert set(report.loaded) == set(kept)
    assert report.unused == ()
    assert_same(found, kept | fresh)


def test_parts_are_combined(model, tmp_path):
    """Phase 1 starts from an encoder and a decoder."""
    merged = merge_stages(flatten_params(model))
    sections = CONFIG.to_dict()
    vision = {path: array for path, array in merged.items() if path.startswith("encoder.")}
    text = {path: array for path, array in merged.items() if path.startswith("decoder.")}
    save_params(tmp_path / "encoder", {"encoder": sections["encoder"]}, vision)
    save_params(tmp_path / "decoder", {"decoder": sections["decoder"]}, text)
    with pytest.raises(UserError, match=r"holds only parts of a model \(encoder\)"):
        read_config(tmp_path / "encoder")
    started, report = warm_start([tmp_path / "encoder", tmp_path / "decoder"], CONFIG)
    found = merge_stages(params_of(started))
    for path, array in (vision | text).items():
        np.testing.assert_array_equal(found[path], array)
    assert set(report.loaded) == set(vision | text)
    assert {path.split(".")[0] for path in report.initialised} == {"projector", "image_newline", "refusion"}
    with pytest.raises(UserError, match="another directory has it too"):
        warm_start([tmp_path / "decoder", tmp_path / "decoder"], CONFIG)


def test_nothing_is_dropped_unless_allowed(saved):
    baseline = tiny_config(refusion=None)
    with pytest.raises(UserError, match=r"refusion.blocks.0.ln_q.scale \(24,\) of .*unused"):
        load_model(saved, config=baseline)
    _, report = warm_start([saved], baseline, allow_unused=["refusion"])
    assert report.initialised == ()
    assert all(path.startswith("refusion.") for path in report.unused)


def test_other_shapes_are_listed(saved):
    two_levels = tiny_config(refusion=tiny_refusion(levels=(1, 3)))
    with pytest.raises(UserError) as error:
        load_model(saved, config=two_levels)
    assert "refusion.blocks.0.ln_f.scale" in str(error.value)
    assert "found (3, 16), expected (2, 16)" in str(error.value)


def test_newline_is_optional_only_where_it_is_never_read(model, tmp_path):
    merged = merge_stages(flatten_params(model))
    del merged["image_newline"]
    flat = tiny_config(image=dataclasses.replace(CONFIG.image, grids=((2, 1),), unpad=False))
    save_params(tmp_path / "flat", flat.to_dict(), merged)
    load_model(tmp_path / "flat")
    save_params(tmp_path / "unpad", CONFIG.to_dict(), merged)
    with pytest.raises(UserError, match="image_newline"):
        load_model(tmp_path / "unpad")


def test_load_params_keeps_what_is_stored(tmp_path):
    params = {"image_newline": jnp.arange(4, dtype=jnp.bfloat16)}
    save_params(tmp_path / "one", {"decoder": {}}, params)
    loaded = load_params(tmp_path / "one")
    assert loaded["image_newline"].dtype == jnp.bfloat16
    assert_same(loaded, params)
    assert {p: (s.shape, s.dtype) for p, s in stored_params(tmp_path / "one").items()} == {
        "image_newline": ((4,), jnp.bfloat16)
    }


def test_a_model_keeps_the_types_that_are_stored_unless_another_one_is_asked_for(model, tmp_path):
    def halved(path, leaf):
        return leaf.astype(jnp.bfloat16) if "decoder" in jax.tree_util.keystr(path) else leaf

    save_model(tmp_path / "model", jax.tree_util.tree_map_with_path(halved, model))
    kept, asked = load_model(tmp_path / "model"), load_model(tmp_path / "model", dtype="float32")
    types = {path: array.dtype for path, array in params_of(kept).items()}
    assert {path for path, dtype in types.items() if dtype == jnp.bfloat16} == {p for p in types if "decoder" in p}
    assert {array.dtype for array in params_of(asked).values()} == {np.dtype(np.float32)}
