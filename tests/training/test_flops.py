"""Operation counts against docs/design/methods.md#flops and against the dot products of the traced model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vr_jax.model.batch import Batch
from vr_jax.model.config import VlmConfig, single_tile
from vr_jax.model.decoders.transformer import TransformerConfig
from vr_jax.model.encoders.siglip import SiglipConfig
from vr_jax.model.projectors.pool import PoolConfig
from vr_jax.model.refusion.deepstack import DeepStackConfig
from vr_jax.model.refusion.sva import SvaConfig
from vr_jax.model.refusion.vision_remember import VisionRememberConfig
from vr_jax.model.registry import RefusionConfig
from vr_jax.model.vlm import abstract_model
from vr_jax.training.flops import PEAK_FLOPS, forward_flops, peak_flops, step_flops

GIGA = 1e9


def test_counts_of_the_paper_models():
    """Forward GFLOP for a tile and a token, as in docs/design/methods.md#flops."""
    plain = VisionRememberConfig(cross_attention="plain", insert_after=(1,))
    got = forward_flops(VlmConfig(refusion=plain))
    assert got["encoder"] / GIGA == pytest.approx(365.6, abs=0.1)  # 23 blocks run
    assert forward_flops(VlmConfig(vision_feature_layer=24))["encoder"] / GIGA == pytest.approx(381.4, abs=0.1)
    assert got["projector"] / GIGA == pytest.approx(0.22, abs=0.01)
    assert got["refusion"] / GIGA == pytest.approx(25.3, abs=0.05)
    assert got["decoder"] / GIGA == pytest.approx(0.716, abs=0.001)
    sva = forward_flops(VlmConfig(refusion=SvaConfig(insert_after=(1,))))["refusion"]
    both = forward_flops(VlmConfig(refusion=SvaConfig()))["refusion"]
    aux = 2 * sva - both
    # Cambrian projects a tile's context for each of its 64 queries, we once.
    assert (sva - aux + 63 * 2 * 1024**2) / GIGA == pytest.approx(3.3, abs=0.05)
    assert aux / GIGA == pytest.approx(2.4, abs=0.05)
    assert forward_flops(VlmConfig(refusion=DeepStackConfig()))["refusion"] / GIGA == pytest.approx(0.66, abs=0.01)
    mergers = forward_flops(VlmConfig(refusion=DeepStackConfig(merger="qwen3_vl")))["refusion"]
    assert mergers / GIGA == pytest.approx(35.8, abs=0.05)
    large = TransformerConfig(hidden_size=3584, intermediate_size=18944, num_layers=28, num_heads=28, num_kv_heads=4)
    assert forward_flops(VlmConfig(decoder=large))["decoder"] / GIGA == pytest.approx(13.05, abs=0.01)


def dot_flops(jaxpr, times=1):
    """Two operations per multiply-add of every dot product and convolution, scans included."""
    total = 0
    for equation in jaxpr.eqns:
        params = equation.params
        if equation.primitive.name == "dot_general":
            (contract, _), _ = params["dimension_numbers"]
            depth = np.prod([equation.invars[0].aval.shape[i] for i in contract])
            total += 2 * times * depth * np.prod(equation.outvars[0].aval.shape)
            continue
        if equation.primitive.name == "conv_general_dilated":
            kernel, outputs = equation.invars[1].aval.shape, params["dimension_numbers"].rhs_spec[0]
            depth = np.prod(kernel) / kernel[outputs]
            total += 2 * times * depth * np.prod(equation.outvars[0].aval.shape)
            continue
        inner_times = times * params.get("length", 1) if equation.primitive.name == "scan" else times
        for inner in jax.tree.leaves(
            list(params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                total += dot_flops(inner, inner_times)
    return total


def tiny(other: RefusionConfig | None = None, **options):
    refusion = other
    if options:
        refusion = VisionRememberConfig(insert_after=(1, 3), levels=(1, 2), **options)
    return VlmConfig(
        encoder=SiglipConfig(
            hidden_size=16, intermediate_size=40, num_layers=3, num_heads=2, image_size=16, patch_size=2
        ),
        decoder=TransformerConfig(
            vocab_size=50, hidden_size=24, intermediate_size=56, num_layers=4, num_heads=3, num_kv_heads=1
        ),
        projector=PoolConfig(stride=4),
        refusion=refusion,
        image=single_tile(16),
        vision_feature_layer=2,
    )


def full_row(config, tokens=16, tiles=2):
    cells = np.full((1, tokens), -1)
    cells[0, : tiles * config.cells_per_tile] = np.arange(tiles * config.cells_per_tile)
    ones = jnp.ones((1, tokens), jnp.int32)
    return Batch(
        tokens=ones,
        positions=jnp.arange(tokens)[None],
        segment_ids=ones,
        loss_mask=ones > 0,
        text_token_mask=ones > 0,
        vision_cell=jnp.asarray(cells),
        tile_pixels=jnp.zeros((1, tiles, 16, 16, 3), jnp.uint8),
        tile_segment=jnp.ones((1, tiles), jnp.int32),
        tile_image=jnp.arange(1, tiles + 1)[None],
    )


@pytest.mark.parametrize(
    "refusion",
    [
        {},
        {"cross_attention": "plain"},
        {"cross_attention": "absorbed"},
        {"cross_attention": "plain", "up": "mlp"},
        {"cross_attention": "plain", "ffn_multiplier": 4, "cross_heads": 4},
        {"cross_attention": "plain", "self_attention": False},
        {"interaction": "global", "cross_attention": "absorbed"},
        {"interaction": "global", "cross_attention": "plain", "cross_heads": 2},
        {"interaction": "deformable", "cross_heads": 2, "points": 3},
        {"interaction": "deformable", "up": "mlp"},
        {"other": DeepStackConfig(insert_after=(1, 3), levels=(1, 2))},
        {"other": DeepStackConfig(insert_after=(1, 3), levels=(1, 2), merger="qwen3_vl")},
        {"other": SvaConfig(insert_after=(1, 3), levels=(2,), width=32, heads=4, depth=2)},
    ],
)
def test_counts_equal_the_dot_products_of_the_model(refusion):
    config = tiny(**refusion)
    model = abstract_model(config)
    batch = full_row(config)
    traced = dot_flops(jax.make_jaxpr(lambda m, b: m.logits(m(b)[0]))(model, batch).jaxpr)

    got = forward_flops(config)
    tiles, tokens = 2, 16
    expected = tiles * (got["encoder"] + got["projector"] + got["refusion"])
    # The traced model computes every pair of the row and every position's logits.
    expected += tokens * (got["decoder"] + got["head"]) + tokens**2 * got["attention"]
    if getattr(config.refusion, "self_attention", False):
        blocks, width = len(config.refusion.insert_after), config.decoder.hidden_size
        scores = 4 * tokens * (tokens + tiles) * width  # left out of the count: attention among vision tokens
        other_tokens = 8 * (tokens - tiles * config.cells_per_tile) * width**2  # computed in token space, not needed
        text_token_kv = 4 * tiles * width**2
        expected += blocks * (scores + other_tokens + text_token_kv)
    if refusion.get("cross_attention") == "absorbed":
        inner = 2 * config.encoder.hidden_size
        expected += 2 * 2 * inner**2  # folding the norm's bias into the value bias, once per block
    if refusion.get("ffn_multiplier"):
        expected += 2 * 4 * (tokens - tiles * config.cells_per_tile) * 4 * config.decoder.hidden_size**2
    assert traced == expected


def test_backward_costs_follow_what_is_trained():
    config, unit = tiny(cross_attention="plain"), {"tiles": 3, "tokens": 7, "pairs": 28, "targets": 2}
    forward = forward_flops(config)
    phase1 = step_flops(config, ["projector.fc1.kernel", "refusion.blocks.0.up.kernel"])
    assert phase1.per_token == 2 * forward["decoder"]
    assert phase1.per_target == 2 * forward["head"]
    assert phase1.per_tile == forward["encoder"] + 3 * (forward["projector"] + forward["refusion"])
    phase2 = step_flops(config, ["projector.fc1.kernel", "decoder.stages.0.mlp.up.kernel", "decoder.embed.embedding"])
    assert phase2.per_token == 3 * forward["decoder"]
    assert phase2.per_target == 3 * forward["head"]
    assert phase2.per_pair == 3 * forward["attention"]
    assert phase1.total(**unit) == (
        3 * phase1.per_tile + 7 * phase1.per_token + 28 * phase1.per_pair + 2 * phase1.per_target
    )


def test_peaks_by_device_kind():
    class Device:
        def __init__(self, device_kind):
            self.device_kind = device_kind

    assert peak_flops(Device("NVIDIA H100 80GB HBM3")) == PEAK_FLOPS["NVIDIA H100"]
    assert peak_flops(Device("NVIDIA H100 PCIe")) == PEAK_FLOPS["NVIDIA H100 PCIe"]
    assert peak_flops(Device("NVIDIA H200")) == PEAK_FLOPS["NVIDIA H200"]
    assert peak_flops(Device("NVIDIA H20")) == PEAK_FLOPS["NVIDIA H20"]
    assert peak_flops(Device("TPU v5 lite")) == PEAK_FLOPS["TPU v5 lite"]
    assert peak_flops(Device("TPU v5")) == PEAK_FLOPS["TPU v5"]
    assert peak_flops(jax.devices()[0]) is None
