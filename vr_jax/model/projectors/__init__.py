"""Token-compressing projectors: window-major encoder features in, vision tokens of the decoder's width out.

To add one: a module in this folder with a config class (ProjectorConfig itself where name and stride are enough) and a
module class `__init__(config, model_config, *, dtype, rngs)`, `__call__(*levels (..., cells, patches, D_v)) ->
(..., vision tokens, D_t)` with one array per hidden state of `config.feature_levels`; then its name in PROJECTORS."""

from typing import Any, NamedTuple

from vr_jax.model.config_base import ProjectorConfig
from vr_jax.model.projectors.pool import MlpProjector, PoolProjector


class Entry(NamedTuple):
    config: type[ProjectorConfig]
    module: Any  # the nnx.Module class


PROJECTORS: dict[str, Entry] = {
    "mlp": Entry(ProjectorConfig, MlpProjector),
    "pool": Entry(ProjectorConfig, PoolProjector),
}
