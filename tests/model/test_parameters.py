"""Parameters are numbered by layer of the whole stack when merged, and come back to their stages when split."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.tiny import params_of, randomized, tiny_config
from vr_jax.model.parameters import flatten_params, merge_stages, split_stages
from vr_jax.model.vlm import abstract_model

CONFIG = tiny_config()


@pytest.fixture(scope="module")
def model():
    """A model with random values everywhere."""
    return randomized(abstract_model(CONFIG))


def test_merge_and_split_are_inverse_and_number_layers_across_stages(model):
    staged = params_of(model)
    merged = merge_stages(staged)
    layers = CONFIG.decoder.num_layers
    assert merged["decoder.layers.attn.q.kernel"].shape[0] == layers
    first, second = CONFIG.refusion.insert_after
    for layer, (stage, index) in {
        0: (0, 0),
        first: (1, 0),
        second: (2, 0),
        layers - 1: (2, layers - 1 - second),
    }.items():
        np.testing.assert_array_equal(
            merged["decoder.layers.mlp.up.kernel"][layer], staged[f"decoder.stages.{stage}.mlp.up.kernel"][index]
        )
    split = split_stages(merged, CONFIG)
    assert split.keys() == staged.keys()
    for path, value in staged.items():
        np.testing.assert_array_equal(split[path], value, err_msg=path)


def test_split_refuses_another_depth(model):
    deeper = tiny_config(decoder=dataclasses.replace(CONFIG.decoder, num_layers=5))
    with pytest.raises(ValueError, match=r"holds 4 layers, the config has 5"):
        split_stages(merge_stages(flatten_params(model)), deeper)
