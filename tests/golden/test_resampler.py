"""The resampler against recorded outputs of MiniCPM-V's: any grid of patches, both kinds of key positions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import torch_weights
from tests.golden.discovery import Case, cases
from tests.golden.test_projectors import tiny_model
from tests.tiny import abstract_projector
from vr_jax.convert.method_tables import PROJECTORS as NAMES
from vr_jax.model.batch import TilePlaces
from vr_jax.model.windows import to_windows


def official_resampler(case: Case):
    """A tile of one patch per query: the resampler itself takes any grid. `pos_embed` is constant and ours too."""
    c = case.config
    fields = {"name": "resampler", "stride": 1, "heads": c["num_heads"], "adaptive": c["adaptive"]}
    config = tiny_model(c["grid_size"], c["kv_dim"], c["embed_dim"], fields)
    weights = {name: value for name, value in case.weights.items() if name != "pos_embed"}
    return torch_weights.load(abstract_projector(config), NAMES["resampler"], weights, "projector.")


@jax.jit
def run(resampler, x, positions):
    values = resampler.keys_values(x)
    return {
        "ln_q": resampler.ln_q(resampler.query[...]),
        "ln_kv": values,
        "attn_out_query_first": jnp.swapaxes(resampler.attend(values, positions), 0, 1),
        "y": resampler.resample(x, positions),
        **({"kv_proj": resampler.kv_proj(x)} if hasattr(resampler, "kv_proj") else {"kv_proj": x}),
    }


@pytest.mark.parametrize("case", cases("resampler_minicpm", known=("resampler",)))
def test_matches_official_output(case: Case):
    resampler, expected = official_resampler(case), case.outputs
    positions = resampler.key_positions(*case.config["tgt_hw"])
    found = run(resampler, case.inputs["x"], positions) | {"key_pos_embed": positions}
    assert expected.keys() <= found.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, **case.tolerance(), err_msg=name)
    np.testing.assert_allclose(resampler.query_positions, case.weights["pos_embed"], atol=1e-6)


@pytest.mark.parametrize("case", cases("resampler_minicpm", known=("resampler",)))
def test_features_as_an_encoder_gives_them(case: Case):
    """As it runs inside the model: window-major tiles of a square grid, or slots with slices of any grid."""
    (rows, columns), side, x = case.config["tgt_hw"], case.config["grid_size"], jnp.asarray(case.inputs["x"])
    resampler = official_resampler(case)
    if rows == columns and rows % side == 0:
        tokens = jax.jit(lambda r, x: r(x))(resampler, to_windows(x, rows // side))
        np.testing.assert_allclose(tokens, case.outputs["y"], **case.tolerance())
    if not case.config["adaptive"]:
        return
    # Three slots: the slice, followed by patches that must not matter; an unused slot; and a slice of another grid.
    slot = rows * columns + 7
    filled = jnp.full((len(x), 3, 1, slot, x.shape[-1]), 3.0).at[:, 0, 0, : rows * columns].set(x)
    extent = np.broadcast_to(np.array([(rows, columns), (0, 0), (2, 3)], np.int32), (len(x), 3, 2))
    places = TilePlaces(image=np.ones((len(x), 3), np.int32), extent=extent)
    tokens = np.asarray(jax.jit(lambda r, x, places: r(x, places))(resampler, filled, places))
    np.testing.assert_allclose(tokens[:, 0], case.outputs["y"], **case.tolerance())
    assert np.isfinite(tokens).all()
