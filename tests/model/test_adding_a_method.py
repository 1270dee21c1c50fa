"""What docs/methods.md tells a user who adds a projector works as written."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.tiny import tiny_config
from vr_jax import sharding
from vr_jax.model.config import VlmConfig
from vr_jax.model.parameters import flatten_params
from vr_jax.model.projectors import PROJECTORS
from vr_jax.model.registry import ProjectorConfig
from vr_jax.model.vlm import VisionLanguageModel

PAGE = Path(__file__).resolve().parents[2] / "docs" / "methods.md"


def test_the_projector_of_the_page(monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.setitem(PROJECTORS, "power_pool", None)  # taken out again afterwards
    names: dict = {"__name__": "my_projector"}
    exec(compile(code, str(PAGE), "exec"), names)

    config = tiny_config(projector=names["PowerPoolConfig"](stride=2, power=1))
    assert VlmConfig.from_dict(config.to_dict()) == config
    assert tiny_config(projector=ProjectorConfig(name="power_pool", stride=2)).projector.power == 3

    model = nnx.eval_shape(lambda: VisionLanguageModel(config, rngs=nnx.Rngs(0)))
    for path, leaf in flatten_params(model).items():
        sharding.param_spec(path, leaf.ndim)
    ours = names["PowerPool"](config.projector, config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    pool = PROJECTORS["pool"].module(config.projector, config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    features = jax.random.normal(jax.random.key(0), (1, 1, 9, 4, config.encoder.hidden_size))
    np.testing.assert_allclose(ours(features), pool(features), atol=1e-6)
