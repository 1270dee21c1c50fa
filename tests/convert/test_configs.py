"""config.json of published checkpoints, as far as they are public, to our config and back."""

from __future__ import annotations

from pathlib import Path

import pytest

from vr_jax.convert.config_writing import write_llava
from vr_jax.convert.configs import read_llava
from vr_jax.convert.decoder_configs import QWEN2_FAMILY, read_decoder, write_decoder
from vr_jax.convert.encoder_configs import SIGLIP_FAMILY, read_encoder, write_encoder
from vr_jax.model.config import anyres4
from vr_jax.model.decoders.transformer import TransformerConfig
from vr_jax.model.encoders.siglip import SiglipConfig

FILE = Path("config.json")
# lmms-lab/llava-onevision-qwen2-7b-ov, without the fields that do not concern the model.
ONEVISION_7B = {
    "architectures": ["LlavaQwenForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 3584,
    "image_aspect_ratio": "anyres_max_9",
    "image_grid_pinpoints": [[384 * i, 384 * j] for i in range(1, 7) for j in range(1, 7)],
    "intermediate_size": 18944,
    "mm_hidden_size": 1152,
    "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None,
    "mm_use_im_start_end": False,
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "google/siglip-so400m-patch14-384",
    "model_type": "llava",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}


def test_llavas_own_config():
    config = read_llava(ONEVISION_7B, FILE, own_layers=26, encoder=None, decoder=None, text=QWEN2_FAMILY)
    assert config.encoder == SiglipConfig(
        hidden_size=1152, intermediate_size=4304, num_layers=26, num_heads=16, image_size=384, patch_size=14
    )
    assert config.vision_feature_layer == 26  # LLaVA deletes block 27 and takes what is left, not post-normalised
    assert config.decoder == TransformerConfig(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        tie_word_embeddings=False,
    )
    assert config.image.grids == tuple((i, j) for i in range(1, 7) for j in range(1, 7))
    assert (config.image.aspect_ratio, config.image.max_tiles, config.image.unpad) == ("anyres_max", 9, True)
    written = write_llava(config)
    same = set(ONEVISION_7B) - {"model_type", "mm_vision_select_layer", "mm_resampler_type", "rope_scaling"}
    same -= {"mm_use_im_start_end", "sliding_window"}
    assert {name: written[name] for name in same} == {name: ONEVISION_7B[name] for name in same}
    assert read_llava(written, FILE, own_layers=26, encoder=None, decoder=None, text=QWEN2_FAMILY) == config


def test_llava_next_pinpoints_in_their_order():
    pinpoints = "[(384, 768), (768, 384), (768, 768), (1152, 384), (384, 1152)]"
    values = ONEVISION_7B | {"image_aspect_ratio": "anyres", "image_grid_pinpoints": pinpoints}
    config = read_llava(values, FILE, own_layers=0, encoder=SiglipConfig(), decoder=None, text=QWEN2_FAMILY)
    assert config.image == anyres4()
    assert (config.encoder.num_layers, config.vision_feature_layer) == (24, 23)


@pytest.mark.parametrize(
    "values",
    [
        # What a config.json leaves out is transformers' default.
        {"architectures": ["SiglipModel"], "vision_config": {"model_type": "siglip_vision_model"}},
        {"architectures": ["SiglipVisionModel"], "model_type": "siglip_vision_model"},
    ],
)
def test_defaults_are_transformers(values):
    base = SiglipConfig(
        hidden_size=768, intermediate_size=3072, num_layers=12, num_heads=12, image_size=224, patch_size=16
    )
    assert read_encoder(SIGLIP_FAMILY, values, FILE) == base
    assert read_encoder(SIGLIP_FAMILY, write_encoder(base), FILE) == base


@pytest.mark.parametrize(
    "rope", [{"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}]
)
def test_rope_of_transformers_4_and_5(rope):
    values = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, **rope}
    config = read_decoder(QWEN2_FAMILY, values, FILE)
    assert config.rope_theta == 5e5
    assert read_decoder(QWEN2_FAMILY, write_decoder(config), FILE) == config
