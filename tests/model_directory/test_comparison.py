"""The config of a model is compared with that of the directories whose parameters it takes."""

from __future__ import annotations

import dataclasses

import pytest

from tests.tiny import tiny_config, tiny_decoder, tiny_encoder, tiny_projector, tiny_refusion
from vr_jax.errors import UserError
from vr_jax.model_directory import warm_start
from vr_jax.model_directory.comparison import config_differences

CONFIG = tiny_config()
STORED = CONFIG.to_dict()
PATHS = ("encoder.post_norm.scale", "decoder.norm.scale", "projector.fc1.kernel", "refusion.blocks.0.up.kernel")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"decoder": tiny_decoder(rope_theta=1e4)}, "decoder.rope_theta = 1000000.0 there, 10000.0 in the config"),
        ({"decoder": tiny_decoder(rms_norm_eps=1e-5)}, "decoder.rms_norm_eps = 1e-06 there, 1e-05 in the config"),
        ({"decoder": tiny_decoder(num_heads=2)}, "decoder.num_heads = 4 there, 2 in the config"),
        (
            {"decoder": tiny_decoder(tie_word_embeddings=False)},
            "decoder.tie_word_embeddings = True there, False in the config",
        ),
        ({"encoder": tiny_encoder(layer_norm_eps=1e-5)}, "encoder.layer_norm_eps = 1e-06 there, 1e-05 in the config"),
        ({"encoder": tiny_encoder(num_heads=4)}, "encoder.num_heads = 2 there, 4 in the config"),
        ({"projector": tiny_projector("mlp"), "refusion": None}, "projector.stride = 2 there, 1 in the config"),
        (
            {"refusion": tiny_refusion(insert_after=(1, 2))},
            "refusion.insert_after = [1, 3] there, [1, 2] in the config",
        ),
        ({"vision_feature_layer": 4}, "vision_feature_layer = 3 there, 4 in the config"),
        (
            {"image": dataclasses.replace(CONFIG.image, image_mean=(0.4, 0.5, 0.5))},
            "image.image_mean = [0.5, 0.5, 0.5] there, [0.4, 0.5, 0.5] in the config",
        ),
        (
            {"image": dataclasses.replace(CONFIG.image, resample="bilinear")},
            "image.resample = 'bicubic' there, 'bilinear' in the config",
        ),
    ],
)
def test_each_field_that_differs_is_named_with_both_values(changes, expected):
    found = config_differences(STORED, tiny_config(**changes), PATHS)
    assert expected in found
    field = expected.split(" ")[0]
    assert expected not in config_differences(STORED, tiny_config(**changes), PATHS, [field])
    # A section that is not taken is not compared.
    section = {"image": "encoder", "vision_feature_layer": "projector"}.get(field.split(".")[0], field.split(".")[0])
    others = [path for path in PATHS if not path.startswith(section)]
    assert expected not in config_differences(STORED, tiny_config(**changes), others)


def test_how_it_is_computed_and_how_images_are_cut_may_differ():
    other = tiny_config(
        refusion=tiny_refusion(cross_attention="plain", init="torch_default"),
        decoder=tiny_decoder(initializer_range=0.5),
        image=dataclasses.replace(CONFIG.image, grids=((1, 1),)),
        dtype="bfloat16",
        remat="full",
    )
    assert config_differences(STORED, other, PATHS) == []


def test_the_pixels_of_an_encoder_alone_are_compared():
    stored = {"encoder": STORED["encoder"], "pixels": {"image_mean": [0.4] * 3, "resample": "bicubic"}}
    found = config_differences(stored, CONFIG, PATHS)
    assert found == ["image.image_mean = [0.4, 0.4, 0.4] there, [0.5, 0.5, 0.5] in the config"]


def test_a_warm_start_refuses_another_rotary_base_unless_it_is_allowed(saved):
    other = tiny_config(decoder=tiny_decoder(rope_theta=1e4, rms_norm_eps=1e-5))
    with pytest.raises(UserError, match=r"config.allow_different") as error:
        warm_start([saved], other)
    message = str(error.value)
    assert f"{saved}: decoder.rope_theta = 1000000.0 there, 10000.0 in the config" in message
    assert f"{saved}: decoder.rms_norm_eps = 1e-06 there, 1e-05 in the config" in message
    warm_start([saved], other, allow_different=["decoder.rope_theta", "decoder.rms_norm_eps"])
