"""Projectors against the recorded outputs of the official code."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.golden.discovery import Case, cases
from tests.helpers import with_params
from vr_jax.model.config import ProjectorConfig
from vr_jax.model.projectors import build_projector
from vr_jax.model.windows import to_windows

# kind in the case files -> (our name, {our module: its torch name}); a case of these kinds needs no new code.
KINDS = {
    "mlp2x": ("mlp", {"fc1": "0", "fc2": "2"}),
    "deco": ("pool", {"fc1": "mlp_projector.0", "fc2": "mlp_projector.2"}),
}


@pytest.mark.parametrize("case", cases("projectors", known=KINDS))
def test_matches_official_output(case: Case):
    name, modules = KINDS[case.kind]
    stride = case.config.get("s", 1)
    widths = case.config["Dv"], case.config["Dt"]
    config = ProjectorConfig(name=name, stride=stride)
    projector = nnx.eval_shape(lambda: build_projector(config, *widths, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    params = {}
    for ours, theirs in modules.items():
        params[f"{ours}.kernel"] = case.weights[f"{theirs}.weight"].T
        params[f"{ours}.bias"] = case.weights[f"{theirs}.bias"]
    tokens = with_params(projector, params)(to_windows(jnp.asarray(case.inputs["x"]), stride))
    np.testing.assert_allclose(tokens, case.outputs["y"], **case.tolerance())
