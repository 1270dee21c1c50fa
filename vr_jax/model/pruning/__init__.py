"""Training-free pruners: they drop vision tokens of an already trained model at inference."""

from typing import Any, NamedTuple

from vr_jax.model.config_base import PrunerConfig


class Entry(NamedTuple):
    config: type[PrunerConfig]
    start: Any


PRUNERS: dict[str, Entry] = {}
