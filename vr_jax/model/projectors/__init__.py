"""Token-compressing projectors: window-major encoder features in, vision tokens of the decoder's width out.

To add one: a module in this folder with a config class (ProjectorConfig itself where name and stride are enough) and a
module class `__init__(config, model_config, *, dtype, rngs)`, `__call__(*levels (..., cells, patches, D_v)) ->
(..., vision tokens, D_t)` with one array per hidden state of `config.feature_levels`; then its name in PROJECTORS."""

from typing import Any, NamedTuple

from vr_jax.model.projectors.c_abstractor import CAbstractor, CAbstractorConfig
from vr_jax.model.projectors.ldpv2 import Ldpv2Config, Ldpv2Projector
from vr_jax.model.projectors.perceiver import PerceiverConfig, PerceiverProjector
from vr_jax.model.projectors.pixel_shuffle import PixelShuffleConfig, PixelShuffleProjector
from vr_jax.model.projectors.pool import MlpProjector, PoolProjector
from vr_jax.model.projectors.resampler import Resampler, ResamplerConfig
from vr_jax.model.projectors.token_packer import TokenPacker, TokenPackerConfig
from vr_jax.model.registry import ProjectorConfig


class Entry(NamedTuple):
    config: type[ProjectorConfig]
    module: Any  # the nnx.Module class


PROJECTORS: dict[str, Entry] = {
    "c_abstractor": Entry(CAbstractorConfig, CAbstractor),
    "ldpv2": Entry(Ldpv2Config, Ldpv2Projector),
    "mlp": Entry(ProjectorConfig, MlpProjector),
    "perceiver": Entry(PerceiverConfig, PerceiverProjector),
    "pixel_shuffle": Entry(PixelShuffleConfig, PixelShuffleProjector),
    "pool": Entry(ProjectorConfig, PoolProjector),
    "resampler": Entry(ResamplerConfig, Resampler),
    "token_packer": Entry(TokenPackerConfig, TokenPacker),
}
