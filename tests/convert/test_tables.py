"""The tables name every parameter of every variant once, and both directions are inverse."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.convert import independent_mapping
from tests.golden.discovery import Case, cases
from tests.tiny import quick, random_model, tiny_config, tiny_decoder, tiny_encoder, tiny_projector, tiny_refusion
from vr_jax.convert.formats import LLAVA
from vr_jax.convert.tables import PATCH, VISION_REMEMBER, prefixed, slots
from vr_jax.errors import UserError
from vr_jax.model import registry
from vr_jax.model.config import VlmConfig
from vr_jax.model.parameters import flatten_params, merge_stages
from vr_jax.model.refusion.deepstack import DeepStackConfig
from vr_jax.model.refusion.sva import SvaConfig
from vr_jax.model.windows import patchify, to_raster
from vr_jax.model_directory import load_params, read_config, save_model

VARIANTS = {
    "default": tiny_refusion(),
    "mlp up": tiny_refusion(up="mlp"),
    "tanh gates, ffn": tiny_refusion(residual_gate="tanh", init="torch_default", ffn_multiplier=2),
    "one shared block": tiny_refusion(shared_weights=True),
    "cross-attention only, one level": tiny_refusion(self_attention=False, levels=(2,)),
    "features not normalised": tiny_refusion(feature_norm="none"),
    "joint norm": tiny_refusion(feature_norm="joint"),
    "global": tiny_refusion(interaction="global"),
    "deformable": tiny_refusion(interaction="deformable", points=2),
    "deformable, mlp up": tiny_refusion(interaction="deformable", up="mlp", feature_norm="none"),
    "deepstack": DeepStackConfig(insert_after=(1, 2), levels=(1, 3)),
    "deepstack, patch merger": DeepStackConfig(insert_after=(1, 2), levels=(1, 3), merger="qwen3_vl"),
    "sva": SvaConfig(insert_after=(1, 3), levels=(3,), width=16, heads=4, depth=2),
    "no refusion": None,
}


@pytest.mark.parametrize(
    "variant",
    quick(VARIANTS, "tanh gates, ffn", "joint norm", "deformable, mlp up", "sva"),
)
def test_every_variant_exports_and_imports_itself(variant, tmp_path, converted):
    check_round_trip(
        tiny_config(refusion=VARIANTS[variant], decoder=tiny_decoder(tie_word_embeddings=variant != "joint norm")),
        tmp_path,
        converted,
    )


PROJECTOR_FIELDS = {"token_packer": {"levels": (1, 3), "heads": 2}}


# Without compression it is a model of transformers (test_round_trip.py).
@pytest.mark.parametrize("name", [name for name in registry.names("projector") if name != "mlp"])
def test_every_projector_exports_and_imports_itself(name, tmp_path, converted):
    config = tiny_config(projector=tiny_projector(name, **PROJECTOR_FIELDS.get(name, {})), refusion=None)
    check_round_trip(config, tmp_path, converted)


def check_round_trip(config: VlmConfig, tmp_path, converted):
    model = random_model(config)
    save_model(tmp_path / "ours", model)
    converted("export", "--from", tmp_path / "ours", "--to", tmp_path / "out", "--shard-gb", "0.00002")
    exported = json.loads((tmp_path / "out" / "config.json").read_text())
    assert VlmConfig.from_dict(exported["vr_jax"]) == config
    converted("import", "--from", tmp_path / "out", "--to", tmp_path / "again")
    assert read_config(tmp_path / "again") == config
    expected, found = merge_stages(flatten_params(model)), load_params(tmp_path / "again")
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


@pytest.mark.parametrize("case", cases("vr_reference", known=("block", "llm")))
def test_vision_remember_has_the_names_of_the_reference(case: Case):
    theirs = independent_mapping.under(case.weights, "vr.0.") if case.kind == "llm" else case.weights
    ours = independent_mapping.vision_remember(theirs)
    theirs = {f"0.{name}": value for name, value in theirs.items()}
    ours = {f"refusion.blocks.0.{path}": value for path, value in ours.items()}
    places = slots(VISION_REMEMBER, ours)
    assert {name: slot.shape for name, slot in places.items()} == {name: value.shape for name, value in theirs.items()}
    placed = {path: np.full_like(value, np.nan) for path, value in ours.items()}
    for name, slot in places.items():
        np.testing.assert_array_equal(slot.take(ours), theirs[name])
        slot.place(theirs[name], placed)
    for path, value in ours.items():
        np.testing.assert_array_equal(placed[path], value)


def test_patch_kernel_is_torchs_convolution():
    """A convolution of stride p over the image is our patchify and a matrix product."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    kernel, pixels = rng.normal(size=(5, 3, 4, 4)), rng.normal(size=(8, 8, 3))
    expected = torch.nn.functional.conv2d(
        torch.from_numpy(pixels.transpose(2, 0, 1)[None]), torch.from_numpy(kernel), stride=4
    )
    expected = expected.numpy()[0].reshape(5, -1).T  # raster order
    with jax.enable_x64(True):
        patches = np.asarray(to_raster(patchify(jnp.asarray(pixels), 4, 1)))
    # A sum of 48 float64 products of size 1 is off by up to 3e-15 (measured). The bound is three hundred times that.
    np.testing.assert_allclose(patches @ PATCH.to_ours(kernel), expected, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(PATCH.to_theirs(PATCH.to_ours(kernel)), kernel)


def test_a_parameter_without_a_name_is_an_error():
    with pytest.raises(UserError, match=r"no name for the parameters \['projector.new'\]"):
        slots(LLAVA.table(LLAVA.sections, tiny_config().to_dict()), {"projector.new": jnp.zeros(2)})


def test_packed_projections_are_in_the_order_q_k_v():
    params = {
        f"refusion.blocks.3.self_attn.{x}.{kind}": np.full((2, 2) if kind == "kernel" else 2, k, np.float32)
        for k, x in enumerate("qkv")
        for kind in ("kernel", "bias")
    }
    params |= {f"refusion.blocks.3.self_attn.out.{k}": np.zeros((2,) * n) for k, n in (("kernel", 2), ("bias", 1))}
    packed = slots(prefixed("model.vision_remember.", VISION_REMEMBER), params)
    weight = packed["model.vision_remember.3.self_attn.in_proj_weight"].take(params)
    np.testing.assert_array_equal(weight[:, 0], [0, 0, 1, 1, 2, 2])
    bias = packed["model.vision_remember.3.self_attn.in_proj_bias"].take(params)
    np.testing.assert_array_equal(bias, [0, 0, 1, 1, 2, 2])


def test_layout_of_a_plain_llava(tmp_path, convert, converted):
    """The layout hf is refused with the reason where transformers has no such model; llava writes LLaVA's names."""
    save_model(tmp_path / "ours", random_model(tiny_config(refusion=None)))
    status, _, err = convert("export", "--from", tmp_path / "ours", "--layout", "hf", "--to", tmp_path / "out")
    assert status == 2
    assert "transformers has no model with projector 'pool'; use --layout llava" in err
    converted("export", "--from", tmp_path / "ours", "--to", tmp_path / "out")
    names = load_file(tmp_path / "out" / "model-00001-of-00001.safetensors").keys()
    assert {"model.mm_projector.0.weight", "model.image_newline", "model.layers.3.mlp.up_proj.weight"} <= names
    depth = tiny_encoder().num_layers
    tower = [name for name in names if name.startswith("model.vision_tower.vision_tower.vision_model.encoder.layers.")]
    assert len({name.split(".")[6] for name in tower}) == depth
