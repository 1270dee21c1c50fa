"""Token-compressing projectors: window-major encoder features in, vision tokens of the decoder's width out.

To add one: a module in this folder with `__init__(config, vision_width, text_width, *, dtype, rngs)` and
`__call__(features (..., cells, patches, D_v)) -> (..., cells, D_t)`, and its name in PROJECTORS."""

from flax import nnx
from jax.typing import DTypeLike

from vr_jax.model.config import ConfigError, ProjectorConfig
from vr_jax.model.projectors.pool import MlpProjector, PoolProjector

PROJECTORS: dict[str, type[PoolProjector]] = {"mlp": MlpProjector, "pool": PoolProjector}


def build_projector(
    config: ProjectorConfig, vision_width: int, text_width: int, *, dtype: DTypeLike, rngs: nnx.Rngs
) -> PoolProjector:
    """Raises ConfigError for an unknown name, listing the known ones."""
    if config.name not in PROJECTORS:
        raise ConfigError(f"projector.name = {config.name!r}: known projectors are {sorted(PROJECTORS)}")
    return PROJECTORS[config.name](config, vision_width, text_width, dtype=dtype, rngs=rngs)
