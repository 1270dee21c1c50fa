"""Adaptive windows inside Vision Remember: a patch reaches the tokens whose windows hold it, and no other."""

from __future__ import annotations

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals

from tests.model.families import family_batch, family_config
from tests.tiny import quick, random_model
from vr_jax.model.refusion.context import VisionContext
from vr_jax.model.vlm import abstract_model


def holders(batch, config) -> np.ndarray:
    """(B, N, T, P): whether a token's window holds a patch of a slot, by the definition of the windows."""
    side, patches = config.cells_per_side, config.spec.patches_per_tile
    cell, extent = np.asarray(batch.vision_cell), np.asarray(batch.tile_extent)
    found = np.zeros((*cell.shape, extent.shape[1], patches), bool)
    for b, n in zip(*np.nonzero(cell >= 0), strict=True):
        tile, (i, j) = cell[b, n] // side**2, divmod(cell[b, n] % side**2, side)
        rows, columns = extent[b, tile]
        for row in range(math.floor(i * rows / side), math.ceil((i + 1) * rows / side)):
            for column in range(math.floor(j * columns / side), math.ceil((j + 1) * columns / side)):
                found[b, n, tile, row * columns + column] = True
    return found


@pytest.mark.parametrize("cross_attention", quick(["absorbed", "plain"], "absorbed"))
def test_a_patch_reaches_the_tokens_whose_windows_hold_it(cross_attention: str):
    config = family_config("minicpm_v")
    config = dataclasses.replace(config, refusion=dataclasses.replace(config.refusion, cross_attention=cross_attention))
    model, batch = random_model(config), family_batch("minicpm_v", config)
    slots, patches = batch.tile_image.shape[1], config.spec.patches_per_tile
    rng = np.random.default_rng(0)
    width = config.encoder.hidden_size
    levels = [rng.normal(size=(2, slots, 1, patches, width)).astype(np.float32) for _ in config.refusion.levels]
    hidden = rng.normal(size=(*batch.tokens.shape, config.decoder.hidden_size)).astype(np.float32)

    @jax.jit
    def perturbed(model, hidden, levels):
        features = model.refusion.prepare(tuple(levels))

        def one(patch):
            hit = (jnp.arange(slots * patches) == patch).reshape(slots, 1, patches, 1)
            other = jnp.where(hit, features[..., ::-1] + 1, features)
            vision = VisionContext.of(batch, other, config.cells_per_tile, config.window_slots).in_windows()
            return model.refusion.block(0).cross(hidden, vision)

        # One loop over all patches, in which -1 is none, gives equal bits for equal inputs.
        return jax.lax.map(one, jnp.arange(-1, slots * patches))

    reference, *changed = np.asarray(perturbed(model, hidden, levels))
    expected = holders(batch, config).reshape(*batch.tokens.shape, -1)
    assert expected.sum(axis=1).max() >= 4  # a patch of several windows
    assert not expected.any(axis=(0, 1)).all()  # patches of no window
    for patch, states in enumerate(changed):
        np.testing.assert_array_equal((states != reference).any(axis=-1), expected[..., patch])


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_backward_pass_keeps_slots_and_not_windows(remat: str, capsys: pytest.CaptureFixture):
    """Windows have more slots than their slice has patches; without rematerialisation they are kept."""
    config = dataclasses.replace(family_config("minicpm_v"), remat=remat)
    model, batch = abstract_model(config), family_batch("minicpm_v", config)
    print_saved_residuals(lambda model: jnp.sum(model(batch)[0]), model)
    shapes = re.findall(r"^f32\[([\d,]+)\]", capsys.readouterr().out, re.MULTILINE)
    sizes = [math.prod(map(int, shape.split(","))) for shape in shapes]
    slots, width = batch.tile_image.size, len(config.refusion.levels) * config.encoder.hidden_size
    kept = slots * config.spec.patches_per_tile * width
    gathered = slots * config.cells_per_tile * config.window_slots * width
    assert kept < gathered
    assert kept in sizes
    assert (max(sizes) >= gathered) == (remat == "none")


def test_square_tiles_are_in_windows_already():
    config = family_config("llava")
    batch = family_batch("llava", config)
    context = VisionContext.of(batch, np.zeros((2, 4, 9, 4, 3)), config.cells_per_tile)
    assert context.in_windows() is context
    assert context.valid is None
