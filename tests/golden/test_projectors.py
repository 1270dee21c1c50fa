"""Projectors against the recorded outputs of the official code, with its weights by the tables of vr_jax.convert."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import torch_weights
from tests.golden.discovery import Case, cases
from tests.tiny import abstract_projector
from vr_jax.convert.method_tables import PROJECTORS as NAMES
from vr_jax.model.config import VlmConfig, single_tile
from vr_jax.model.decoders.transformer import TransformerConfig
from vr_jax.model.encoders.siglip import SiglipConfig
from vr_jax.model.registry import ProjectorConfig
from vr_jax.model.windows import to_raster, to_windows

# kind in the case files -> our name and the fields of its config
KINDS = {
    "mlp2x": lambda c: {"name": "mlp", "stride": 1},
    "deco": lambda c: {"name": "pool"},
    "pixelshuffle": lambda c: {"name": "pixel_shuffle"},
    # Windows of 2 x 2, which it must not notice.
    "perceiver": lambda c: {
        "name": "perceiver",
        "stride": 2,
        "latents": c["n"] ** 2,
        "depth": c["depth"],
        "ff_multiplier": c["ff_mult"],
    },
    "ldpv2": lambda c: {"name": "ldpv2"},
    "tokenpacker": lambda c: {
        "name": "token_packer",
        "levels": list(range(1, 1 + c["levels"])),
        "width": c["E"],
        "heads": c["heads"],
    },
    "cabstractor": lambda c: {"name": "c_abstractor", "depth": c["depth"]},
}


def tiny_model(grid: int, vision_width: int, text_width: int, projector: dict) -> VlmConfig:
    return VlmConfig(
        encoder=SiglipConfig(hidden_size=vision_width, num_heads=1, num_layers=8, image_size=grid, patch_size=1),
        decoder=TransformerConfig(vocab_size=1, hidden_size=text_width, num_layers=2, num_heads=1, num_kv_heads=1),
        projector=ProjectorConfig.from_dict(projector),
        image=single_tile(grid),
        vision_feature_layer=0,
    )


def official_projector(case: Case):
    """The case's projector with its recorded weights, and its inputs in windows."""
    c = case.config
    fields = {"stride": c.get("s", 1)} | KINDS[case.kind](c)
    config = tiny_model(c["grid"], c["Dv"], c["Dt"], fields)
    projector = abstract_projector(config)
    projector = torch_weights.load(projector, NAMES[config.projector.name], case.weights, "projector.")
    inputs = [case.inputs["x"]]
    if "x_multi" in case.inputs:
        inputs += np.split(case.inputs["x_multi"], c["levels"], axis=-1)
    return projector, [to_windows(jnp.asarray(x), config.projector.stride) for x in inputs]


@pytest.mark.parametrize("case", cases("projectors", known=KINDS))
def test_matches_official_output(case: Case):
    projector, levels = official_projector(case)
    tokens = jax.jit(lambda p, *x: p(*x))(projector, *levels)
    np.testing.assert_allclose(tokens, case.outputs["y"], **case.tolerance())


def chw(x):
    """Cells in raster order, or a map (T, H, W, D), as torch's (T, D, H, W)."""
    if x.ndim == 3:
        side = round(x.shape[1] ** 0.5)
        x = x.reshape(x.shape[0], side, side, x.shape[-1])
    return jnp.moveaxis(x, -1, 1)


def deco(projector, x):
    pooled = jnp.mean(x, axis=-2)
    return {"pooled_chw": chw(pooled), "fc1": projector.fc1(pooled)}


def pixelshuffle(projector, x):
    shuffled = x.reshape(*x.shape[:2], -1)
    return {"shuffled": shuffled, "norm": projector.norm(shuffled)}


def perceiver(projector, x):
    patches = x.reshape(x.shape[0], -1, x.shape[-1])
    latents = projector.first_latents(patches)
    first = jax.tree.map(lambda leaf: leaf[0], projector.layers)
    attended = first.attend(latents, patches)
    fed = first.feed_forward(latents + attended)
    return {"attn0": attended[:, None], "ff0": fed[:, None], "resampled": projector.resample(patches)}


def ldpv2(projector, x):
    mlp = projector.mlp(x)
    return {"mlp": to_raster(mlp), "down": jnp.mean(mlp, axis=-2)}


def tokenpacker(projector, x, *levels):
    stacked = jnp.concatenate(levels, axis=-1)
    query, keys, values = projector.query(x), projector.keys(stacked), projector.values(stacked)
    read = projector.attend(query, keys, values)
    return {
        "query": query,
        "key": to_raster(keys),
        "value": to_raster(values),
        "attn_out_window_major": jnp.swapaxes(read, 0, 1).reshape(1, -1, read.shape[-1]),
    }


def cabstractor(projector, x):
    image = projector.map(x)
    before = projector.before(image)
    pooled = projector.pool(before)
    return {
        "stage1_block1": chw(projector.before.b1(image)),
        "stage1": chw(before),
        "pooled": chw(pooled),
        "stage2": chw(projector.after(pooled)),
    }


STEPS = {f.__name__: f for f in (deco, pixelshuffle, perceiver, ldpv2, tokenpacker, cabstractor)}


@pytest.mark.slow  # It tells where an output differs; the outputs themselves are compared above.
@pytest.mark.parametrize("case", cases("projectors", known=KINDS))
def test_matches_official_steps(case: Case):
    recorded = {name: value for name, value in case.outputs.items() if name != "y"}
    if not recorded:
        pytest.skip(f"projectors case {case.name!r} records the result only")
    projector, levels = official_projector(case)
    steps = jax.jit(STEPS[case.kind])(projector, *levels)
    assert recorded.keys() <= steps.keys()
    for name, expected in recorded.items():
        np.testing.assert_allclose(steps[name], expected, **case.tolerance(), err_msg=name)
