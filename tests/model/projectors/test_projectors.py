"""Projectors beyond their recorded outputs (tests/golden): live references, operations, gradients, errors."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import torch_weights
from tests.helpers import (
    SampleImage,
    Text,
    example,
    pack,
    params_of,
    quick,
    randomized,
    tiny_config,
    tiny_refusion,
    tiny_text,
    tiny_vision,
)
from tests.training.test_flops import dot_flops
from vr_jax.convert.tables import mlp_projector, norm
from vr_jax.errors import ConfigError
from vr_jax.model.config import VlmConfig
from vr_jax.model.projectors import PROJECTORS
from vr_jax.model.projectors.perceiver import PerceiverConfig
from vr_jax.model.projectors.resampler import bicubic
from vr_jax.model.projectors.token_packer import shrink
from vr_jax.model.registry import ProjectorConfig
from vr_jax.model.vlm import VisionLanguageModel
from vr_jax.model.windows import to_windows

torch = pytest.importorskip("torch", reason="the references are torch's")

# What the tiny widths need beside name and stride.
FIELDS = {
    "perceiver": {"heads": 2, "head_dim": 4, "depth": 2},
    "token_packer": {"levels": (1, 2), "width": 12, "heads": 2},
    "c_abstractor": {"depth": 1},
    "resampler": {"heads": 2},
}
COMPRESSING = sorted(set(PROJECTORS) - {"mlp"})


def fields(name: str, stride: int = 2, **changes) -> ProjectorConfig:
    values = {"name": name, "stride": 1 if name == "mlp" else stride} | FIELDS.get(name, {}) | changes
    return VlmConfig.parse_field("projector", values)


def projector_of(config: VlmConfig):
    module = PROJECTORS[config.projector.name].module
    return nnx.eval_shape(lambda: module(config.projector, config, dtype=jnp.dtype(config.dtype), rngs=nnx.Rngs(0)))


def abstract_levels(config: VlmConfig, *batch: int) -> list[jax.ShapeDtypeStruct]:
    stride = config.projector.stride
    shape = (*batch, (config.encoder.grid // stride) ** 2, stride**2, config.encoder.hidden_size)
    levels = config.projector.feature_levels(config)
    return [jax.ShapeDtypeStruct(shape, jnp.dtype(config.dtype)) for _ in levels]


@pytest.mark.parametrize("stride", [2, 3, 4])
@pytest.mark.parametrize("name", COMPRESSING)
def test_shapes_and_precision(name, stride):
    """Any leading axes; activations stay in the model's precision."""
    vision = tiny_vision(image_size=48)
    config = tiny_config(encoder=vision, projector=fields(name, stride), refusion=None, dtype="bfloat16")
    tokens = jax.eval_shape(lambda p, x: p(*x), projector_of(config), abstract_levels(config, 2, 3))
    assert (tokens.shape, tokens.dtype) == ((2, 3, (12 // stride) ** 2, 24), jnp.bfloat16)


def test_more_latents_than_windows():
    """A Perceiver without a re-fusion block may make any square number of tokens."""
    config = tiny_config(projector=fields("perceiver", 2, latents=16), refusion=None)
    assert (config.cells_per_side, config.cells_per_tile) == (4, 16)
    batch = pack(config, [[example(config, Text(2), SampleImage(1), Text(2))]])
    abstract = nnx.eval_shape(lambda: VisionLanguageModel(config, rngs=nnx.Rngs(0)))
    hidden, _ = jax.eval_shape(lambda m, b: m(b), abstract, batch)
    assert hidden.shape == (1, 2 + 16 + 1 + 2, 24)


# Nothing can depend on them: the softmax over a window's keys ignores what all of them share.
WITHOUT_GRADIENT = {"token_packer": {"attn.k.bias", "keys.norm.bias"}, "resampler": {"attn.k.bias"}}


@pytest.mark.parametrize("name", quick(PROJECTORS, "token_packer", "resampler"))
def test_gradient_inside_the_whole_model(name):
    """Every parameter of the projector learns, with Vision Remember and without; one compilation for both."""
    sizes = {
        "encoder": tiny_vision(num_layers=2),
        "decoder": tiny_text(num_layers=2),
        "projector": fields(name),
        "vision_feature_layer": 2,
    }
    refusion = tiny_refusion(insert_after=(1,), levels=(1, 2), cross_heads=2)
    configs = [tiny_config(refusion=i, **sizes) for i in (refusion, None)]
    models = [randomized(nnx.eval_shape(lambda c=c: VisionLanguageModel(c, rngs=nnx.Rngs(0)))) for c in configs]
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


GIGA_FLOPS = {  # methods.md 9.2
    "pool": pytest.approx(0.22, abs=0.005),
    "pixel_shuffle": pytest.approx(1.16, abs=0.005),
    "ldpv2": pytest.approx(1.98, abs=0.005),
    "perceiver": pytest.approx(8.1, abs=0.05),
    "c_abstractor": pytest.approx(8, abs=0.5),
    "token_packer": pytest.approx(15.1, abs=0.05),
}


@pytest.mark.parametrize("name", GIGA_FLOPS)
def test_operations_of_the_paper_sizes(name):
    config = VlmConfig(projector=ProjectorConfig(name=name, stride=3))
    assert config.projector.flops_per_tile(config) / 1e9 == GIGA_FLOPS[name]


@pytest.mark.parametrize("name", PROJECTORS)
def test_operations_equal_the_products_of_the_module(name):
    config = tiny_config(projector=fields(name), refusion=None)
    traced = jax.make_jaxpr(lambda p, x: p(*x))(projector_of(config), abstract_levels(config, 5))
    expected = 5 * config.projector.flops_per_tile(config)
    if name == "resampler":
        expected += 2 * config.cells_per_tile * config.decoder.hidden_size**2  # the queries, once for all tiles
    assert dot_flops(traced.jaxpr) == expected


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 5, 6])
def test_token_packer_query_is_a_bilinear_resize(stride):
    grid = 60 // stride * stride
    x = np.random.default_rng(0).normal(size=(2, grid, grid, 3)).astype(np.float32)
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(x).permute(0, 3, 1, 2), size=grid // stride, mode="bilinear", align_corners=False
    )
    expected = resized.permute(0, 2, 3, 1).numpy().reshape(2, -1, 3)
    np.testing.assert_allclose(shrink(to_windows(jnp.asarray(x.reshape(2, -1, 3)), stride)), expected, atol=1e-6)


@pytest.mark.parametrize(("inputs", "outputs"), [(8, 8), (4, 8), (8, 24), (9, 24), (8, 3), (2, 7)])
def test_bicubic_is_torchs(inputs, outputs):
    x = np.random.default_rng(0).normal(size=(inputs, inputs))
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(x[None, None]), size=(outputs, outputs), mode="bicubic", align_corners=False
    )
    weights = bicubic(inputs, outputs)
    np.testing.assert_allclose(weights @ x @ weights.T, resized.numpy()[0, 0], atol=1e-12)


def test_pixel_shuffle_is_that_of_transformers():
    """InternVL's shuffle and projector, live; its float ratio 1/s is exact for s = 2."""
    internvl = pytest.importorskip("transformers.models.internvl.modeling_internvl")
    from transformers import InternVLConfig, InternVLVisionConfig, Qwen2Config

    config = tiny_config(projector=fields("pixel_shuffle"), refusion=None)
    reference = internvl.InternVLMultiModalProjector(
        InternVLConfig(
            vision_config=InternVLVisionConfig(hidden_size=16),
            text_config=Qwen2Config(hidden_size=24),
            downsample_ratio=0.5,
            projector_hidden_act="gelu",
        )
    )
    torch_weights.randomize(reference)
    names = (*norm("layer_norm", "projector.norm"), *mlp_projector("linear_1", "linear_2"))
    projector = torch_weights.load(projector_of(config), names, torch_weights.state_dict(reference), "projector.")
    x = np.random.default_rng(0).normal(size=(3, 6, 6, 16)).astype(np.float32)
    with torch.no_grad():
        shuffle = functools.partial(internvl.InternVLModel.pixel_shuffle, None)
        shuffled = shuffle(torch.from_numpy(x), scale_factor=0.5)
        expected = reference(shuffled.reshape(3, 9, -1)).numpy()
    windows = to_windows(jnp.asarray(x.reshape(3, 36, 16)), 2)
    np.testing.assert_allclose(windows.reshape(3, 9, -1), shuffled.numpy().reshape(3, 9, -1))
    np.testing.assert_allclose(jax.jit(lambda p, x: p(x))(projector, windows), expected, atol=1e-5)


ERRORS = {
    "unknown name": (
        lambda: tiny_config(projector=ProjectorConfig(name="qformer", stride=2)),
        ["projector.name = 'qformer'", *PROJECTORS],
    ),
    "stride": (lambda: tiny_config(projector=fields("ldpv2", 4)), ["stride = 4", "6 x 6", "[1, 2, 3, 6]"]),
    "latents": (lambda: PerceiverConfig(latents=60), ["latents = 60", "square", "Vision Remember", "49 or 64"]),
    "no latents": (lambda: PerceiverConfig(latents=0), ["latents = 0", "square"]),
    "latents with refusion": (
        lambda: tiny_config(projector=fields("perceiver", 2, latents=16)),
        ["'vision_remember'", "'perceiver' makes 4 x 4 tokens", "stride 2 makes 3 x 3 windows"],
    ),
    "depth": (lambda: PerceiverConfig(depth=0), ["PerceiverConfig.depth = 0", ">= 1"]),
    "abstractor depth": (lambda: fields("c_abstractor", depth=0), ["CAbstractorConfig.depth = 0", ">= 1"]),
    "levels outside": (
        lambda: tiny_config(projector=fields("token_packer", levels=(3, 12))),
        ["projector.levels", "hidden state 12", "0..4"],
    ),
    "levels order": (lambda: fields("token_packer", levels=(3, 2)), ["levels = (3, 2)", "increasing"]),
    "heads": (lambda: tiny_config(projector=fields("token_packer", heads=5)), ["projector.heads = 5", "width 12"]),
    "resampler heads": (lambda: tiny_config(projector=fields("resampler", heads=5)), ["heads = 5", "width 24"]),
    "resampler width": (
        lambda: tiny_config(
            projector=fields("resampler"), decoder=tiny_text(hidden_size=18, num_heads=2), refusion=None
        ),
        ["text.hidden_size = 18", "divisible by 4"],
    ),
    "unknown field": (lambda: fields("perceiver", levels=(1,)), ["PerceiverConfig", "'levels'", "latents"]),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    make, parts = ERRORS[name]
    with pytest.raises(ConfigError) as error:
        make()
    assert [part for part in parts if part not in str(error.value)] == []
