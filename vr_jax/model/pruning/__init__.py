"""Training-free pruners: they drop vision tokens of an already trained model at inference; no parameters.

To add one: a module in this folder with a config class (PrunerConfig) and `start`; then its name in PRUNERS. What most
of them need (attention of the last token, choice of the strongest, dropping, closing the gaps) is in `dropping.py`."""

from typing import Any, NamedTuple

from vr_jax.model.pruning import fastv, pyramid_drop, vispruner
from vr_jax.model.registry import PrunerConfig


class Entry(NamedTuple):
    """start(config, model, levels, batch, lengths) -> what acts before stage k of the decoder, (k, Stream) -> Stream.

    levels: the encoder's hidden states. batch: rows of one segment each (generation; packed rows are not pruned
    sensibly). lengths: the row length of every decoder stage, which holds what `config.kept` counts; None: dropped
    tokens stay in place as padding. Rows keep their alignment to the right."""

    config: type[PrunerConfig]
    start: Any


PRUNERS: dict[str, Entry] = {
    "fastv": Entry(fastv.FastVConfig, fastv.start),
    "pyramid_drop": Entry(pyramid_drop.PyramidDropConfig, pyramid_drop.start),
    "vispruner": Entry(vispruner.VisPrunerConfig, vispruner.start),
}
