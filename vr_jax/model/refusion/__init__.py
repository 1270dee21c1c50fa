"""What acts on the vision tokens between two decoder stages.

To add one: a module in this folder with a config class (from RefusionConfig) and two nnx.Module classes,
`Features(config, model_config, *, dtype, rngs)`, `__call__(levels) -> features`, run once per forward pass on the
encoder's hidden states `config.levels`, each (B, T, cells, patches, D_v), and `Block(config, model_config, index, *,
dtype, rngs)`, `__call__(stream, vision) -> stream`, one for each of `config.blocks`; then its name in REFUSION."""

from typing import Any, NamedTuple

from vr_jax.model.config import VisionRememberConfig
from vr_jax.model.refusion import deepstack, sva, vision_remember
from vr_jax.model.registry import RefusionConfig


class Entry(NamedTuple):
    config: type[RefusionConfig]
    features: Any  # the nnx.Module classes
    block: Any


REFUSION: dict[str, Entry] = {
    "deepstack": Entry(deepstack.DeepStackConfig, deepstack.Features, deepstack.Block),
    "sva": Entry(sva.SvaConfig, sva.Features, sva.Block),
    "vision_remember": Entry(VisionRememberConfig, vision_remember.Features, vision_remember.Block),
}
