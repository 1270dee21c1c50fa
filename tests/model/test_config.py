"""Configs survive JSON, and their errors name the field, what was found and what was expected."""

import json

import jax.numpy as jnp
import pytest

from tests.tiny import tiny_config, tiny_decoder, tiny_encoder, tiny_refusion
from vr_jax.errors import ConfigError
from vr_jax.model.config import ImageConfig, VlmConfig, anyres4, anyres9, anyres9_all36, single_tile
from vr_jax.model.encoders.siglip import SiglipConfig
from vr_jax.model.projectors.pool import PoolConfig
from vr_jax.model.refusion.vision_remember import VisionRememberConfig
from vr_jax.model.vlm import abstract_model


@pytest.mark.parametrize("config", [VlmConfig(), tiny_config(), tiny_config(refusion=None)], ids=repr)
def test_json_round_trip(config: VlmConfig):
    assert VlmConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


ERRORS = {
    "unknown field": (
        lambda: VlmConfig.from_dict({"encoder": {"name": "siglip", "width": 3}}),
        ["VlmConfig.encoder", "'width'", "hidden_size"],
    ),
    "unknown top field": (lambda: VlmConfig.from_dict({"visoin": {}}), ["VlmConfig", "'visoin'", "encoder"]),
    "stride": (lambda: tiny_config(projector=PoolConfig(stride=4)), ["stride = 4", "6 x 6", "[1, 2, 3, 6]"]),
    "insert_after": (
        lambda: tiny_config(refusion=tiny_refusion(insert_after=(1, 5))),
        ["insert_after = (1, 5)", "[5]", "1..4"],
    ),
    "insert_after order": (lambda: VisionRememberConfig(insert_after=(4, 1)), ["insert_after = (4, 1)", "increasing"]),
    "levels": (lambda: tiny_config(refusion=tiny_refusion(levels=(1, 5))), ["refusion.levels", "5", "0..4"]),
    "levels empty": (lambda: VisionRememberConfig(levels=()), ["levels = ()", "at least one"]),
    "negative feature layer": (lambda: tiny_config(vision_feature_layer=-1), ["vision_feature_layer", "-1", ">= 0"]),
    "feature layer": (lambda: tiny_config(vision_feature_layer=9), ["vision_feature_layer", "9", "0..4"]),
    "bilinear grids": (lambda: tiny_config(image=anyres9_all36(24)), ["vision_remember", "bilinear", "anyres9"]),
    "choice": (lambda: VisionRememberConfig(order="both"), ["order = 'both'", "cross_self", "self_cross"]),
    "dtype": (lambda: tiny_config(dtype="float16"), ["dtype = 'float16'", "bfloat16"]),
    "attention": (lambda: tiny_config(attention="flash"), ["attention = 'flash'", "splash"]),
    "cudnn": (lambda: tiny_config(attention="cudnn"), ["attention = 'cudnn'", "'float32'", "'bfloat16'"]),
    "grids": (lambda: ImageConfig(aspect_ratio="anyres"), ["grids", "anyres", "(columns, rows)"]),
    "tile size": (lambda: tiny_config(image=single_tile(32)), ["tile_size = 32", "image_size = 24"]),
    "image token": (lambda: tiny_config(image_token_id=40), ["image_token_id = 40", "vocab_size = 40", "smaller"]),
    "vision heads": (lambda: SiglipConfig(hidden_size=10, num_heads=3), ["hidden_size = 10", "num_heads = 3"]),
    "text heads": (lambda: tiny_decoder(num_heads=5), ["hidden_size = 24", "num_heads = 5"]),
    "key heads": (lambda: tiny_decoder(num_kv_heads=3), ["num_heads = 4", "num_kv_heads = 3"]),
}


@pytest.mark.parametrize("name", ERRORS)
def test_message_names_field_found_and_expected(name: str):
    build, words = ERRORS[name]
    with pytest.raises(ConfigError) as error:
        build()
    assert [word for word in words if word not in str(error.value)] == []
    assert "\n" not in str(error.value)


PARTS = {
    "projector": (
        lambda: VlmConfig.from_dict({"projector": {"name": "pol"}}),
        ["VlmConfig.projector.name = 'pol'", "mlp", "'pool'"],
    ),
    "cross_heads": (
        lambda: tiny_config(refusion=tiny_refusion(cross_heads=5)),
        ["refusion.cross_heads = 5", "48"],
    ),
    "self_heads": (lambda: tiny_config(refusion=tiny_refusion(self_heads=7)), ["refusion.self_heads = 7", "24"]),
    "closed gate": (
        lambda: tiny_config(refusion=tiny_refusion(residual_gate="tanh")),
        ["residual_gate 'tanh'", "zero_out", "torch_default"],
    ),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_that_do_not_fit(name: str):
    config, words = PARTS[name]
    with pytest.raises(ConfigError) as error:
        abstract_model(config())
    assert [word for word in words if word not in str(error.value)] == []


def test_presets():
    assert anyres4().max_tiles_per_image == 5
    assert anyres9().max_tiles_per_image == 10
    assert anyres9_all36().max_tiles_per_image == 37
    assert single_tile().max_tiles_per_image == 1
    assert not anyres9().may_interpolate
    assert anyres9_all36().may_interpolate
    # OneVision shrinks above sqrt(tiles / 9) > 1.1: ten tiles (1.05) do not, twelve (1.15) do.
    assert not ImageConfig(grids=((5, 2),)).may_interpolate
    assert ImageConfig(grids=((4, 3),)).may_interpolate
    so400m = tiny_encoder(image_size=384, patch_size=14)
    assert so400m.grid == 27


def test_derived_sizes():
    config = VlmConfig(refusion=VisionRememberConfig())
    assert (config.encoder.grid, config.cells_per_side, config.cells_per_tile) == (24, 8, 64)
    assert config.feature_levels == (7, 15, 23)
    assert config.encoder_bounds == (0, 7, 15, 23, 24)
    assert config.decoder_bounds == (0, 1, 4, 24)
    assert jnp.dtype(config.dtype) == jnp.float32
