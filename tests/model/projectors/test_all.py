"""Every projector beyond its recorded outputs (tests/golden): shapes, operations and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import (
    SampleImage,
    Text,
    abstract_projector,
    example,
    pack,
    params_of,
    random_model,
    tiny_config,
    tiny_decoder,
    tiny_encoder,
    tiny_projector,
    tiny_refusion,
)
from tests.training.test_flops import dot_flops
from vr_jax.errors import ConfigError
from vr_jax.model import registry
from vr_jax.model.config import VlmConfig
from vr_jax.model.registry import ProjectorConfig

NAMES = registry.names("projector")
COMPRESSING = [name for name in NAMES if name != "mlp"]


def abstract_levels(config: VlmConfig, *batch: int) -> list[jax.ShapeDtypeStruct]:
    """The features that the projector of a model reads, with the leading axes `batch`."""
    stride = config.projector.stride
    shape = (*batch, (config.encoder.grid // stride) ** 2, stride**2, config.encoder.hidden_size)
    levels = config.projector.feature_levels(config.spec)
    return [jax.ShapeDtypeStruct(shape, jnp.dtype(config.dtype)) for _ in levels]


@pytest.mark.parametrize("stride", [2, 3, 4])
@pytest.mark.parametrize("name", COMPRESSING)
def test_shapes_and_precision(name, stride):
    """A projector takes any leading axes and keeps the type of the activations."""
    encoder = tiny_encoder(image_size=48)
    config = tiny_config(encoder=encoder, projector=tiny_projector(name, stride), refusion=None, dtype="bfloat16")
    tokens = jax.eval_shape(lambda p, x: p(*x), abstract_projector(config), abstract_levels(config, 2, 3))
    assert (tokens.shape, tokens.dtype) == ((2, 3, (12 // stride) ** 2, 24), jnp.bfloat16)


# The softmax over a window's keys ignores what all keys share, so these parameters have no gradient.
WITHOUT_GRADIENT = {"token_packer": {"attn.k.bias", "keys.norm.bias"}, "resampler": {"attn.k.bias"}}


@pytest.mark.slow  # Two gradients of the whole model are compiled for each projector.
@pytest.mark.parametrize("name", NAMES)
def test_gradient_inside_the_whole_model(name):
    """Every parameter of the projector has a gradient, with Vision Remember and without."""
    sizes = {
        "encoder": tiny_encoder(num_layers=2),
        "decoder": tiny_decoder(num_layers=2),
        "projector": tiny_projector(name),
        "vision_feature_layer": 2,
    }
    refusion = tiny_refusion(insert_after=(1,), levels=(1, 2), cross_heads=2)
    configs = [tiny_config(refusion=i, **sizes) for i in (refusion, None)]
    models = [random_model(config) for config in configs]
    batch = pack(
        configs[0], [[example(configs[0], Text(2), SampleImage(3), Text(3, text_token=True), Text(3, target=True))]]
    )

    def loss(model):
        hidden, _ = model(batch)
        return jnp.sum(hidden * jnp.cos(jnp.arange(hidden.shape[-1]))) / hidden.shape[-1]

    for value, gradient in jax.jit(lambda models: [jax.value_and_grad(loss)(model) for model in models])(models):
        assert np.isfinite(value)
        found = params_of(gradient.projector)
        largest = {path: np.abs(value).max() for path, value in found.items()}
        still = {path for path, value in largest.items() if value < 1e-5 * max(largest.values())}
        assert still == WITHOUT_GRADIENT.get(name, set())


# Operations of one tile at the sizes of the paper (docs/design/methods.md#flops).
GIGA_FLOPS = {
    "pool": pytest.approx(0.22, abs=0.005),
    "pixel_shuffle": pytest.approx(1.16, abs=0.005),
    "ldpv2": pytest.approx(1.98, abs=0.005),
    "perceiver": pytest.approx(8.1, abs=0.05),
    "c_abstractor": pytest.approx(8, abs=0.5),
    "token_packer": pytest.approx(15.1, abs=0.05),
}


@pytest.mark.parametrize("name", GIGA_FLOPS)
def test_operations_of_the_paper_sizes(name):
    config = VlmConfig(projector=registry.method("projector", name)(stride=3))
    assert config.projector.flops_per_tile(config.spec) / 1e9 == GIGA_FLOPS[name]


@pytest.mark.parametrize("name", NAMES)
def test_operations_equal_the_products_of_the_module(name):
    config = tiny_config(projector=tiny_projector(name), refusion=None)
    traced = jax.make_jaxpr(lambda p, x: p(*x))(abstract_projector(config), abstract_levels(config, 5))
    expected = 5 * config.projector.flops_per_tile(config.spec)
    if name == "resampler":  # The queries are projected once for all tiles.
        expected += 2 * config.cells_per_tile * config.decoder.hidden_size**2
    assert dot_flops(traced.jaxpr) == expected


ERRORS = {
    "unknown name": (
        lambda: ProjectorConfig.from_dict({"name": "pol"}),
        ["projector.name = 'pol'", "did you mean 'pool'?", *NAMES],
    ),
    "name missing": (lambda: ProjectorConfig.from_dict({"stride": 2}), ["projector.name = None", *NAMES]),
    "stride": (lambda: tiny_config(projector=tiny_projector("ldpv2", 4)), ["stride = 4", "6 x 6", "[1, 2, 3, 6]"]),
    "stride below one": (lambda: tiny_projector("pool", 0), ["PoolConfig.stride = 0", "an integer >= 1"]),
    "unknown field": (
        lambda: registry.method("projector", "perceiver").from_dict({"levels": [1]}),
        ["PerceiverConfig", "'levels'", "latents"],
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_a_config_error_names_the_field_and_what_was_expected(name):
    make, parts = ERRORS[name]
    with pytest.raises(ConfigError) as error:
        make()
    assert [part for part in parts if part not in str(error.value)] == []
