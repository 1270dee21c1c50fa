"""torch state dicts into our modules, through the tables of `vr_jax.convert`."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np
import torch

from tests.tiny import with_params
from vr_jax.convert.tables import Table, slots
from vr_jax.model.parameters import flatten_params, merge_stages, merged_path

Weights = Mapping[str, np.ndarray]


def state_dict(module) -> dict[str, np.ndarray]:
    """A torch module's parameters as numpy arrays, `model.*` and `vision_model.*` under the inner model's own names."""
    return {
        name.removeprefix("model.").removeprefix("vision_model."): tensor.detach().float().numpy()
        for name, tensor in module.state_dict().items()
    }


def randomize(module, seed: int = 0, scale: float = 0.2) -> None:
    """Random values in every parameter: initial zeros and ones would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator) * scale
            tensor.copy_(1 + noise if "norm" in name and name.endswith("weight") else noise)


def under(weights: Weights, prefix: str) -> dict[str, np.ndarray]:
    return {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}


def load[Module](module: Module, table: Table, weights: Weights, prefix: str) -> Module:
    """The (possibly abstract) module, which sits at `prefix` in a whole model, with torch's weights; all are used."""
    staged = {prefix + path: leaf for path, leaf in flatten_params(module).items()}
    merged = {path: np.zeros(leaf.shape, np.float32) for path, leaf in jax.eval_shape(merge_stages, staged).items()}
    places = slots(table, merged)
    assert places.keys() == weights.keys()
    for name, slot in places.items():
        assert weights[name].shape == slot.shape, name
        slot.place(weights[name], merged)
    used = dict.fromkeys(merged, 0)
    params = {}
    for path, leaf in staged.items():
        whole = merged_path(path)
        if whole == path:
            params[path] = merged[path]
        else:
            start = used[whole]
            used[whole] += leaf.shape[0]
            params[path] = merged[whole][start : used[whole]]
    return with_params(module, under(params, prefix))
