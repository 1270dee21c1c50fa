"""Systems of the paper at other sizes."""

import dataclasses

import pytest

from tests.tiny import tiny_config
from vr_jax.errors import ConfigError
from vr_jax.experiments import BASELINE, DECODERS, VISION_REMEMBER, System, find_row


@pytest.fixture
def size():
    return tiny_config(refusion=None)


def test_a_system_takes_the_sizes_and_keeps_its_methods(size):
    levels = {7: 1, 15: 2, 23: 3}
    model = VISION_REMEMBER.at(size, levels, {"pool": {"stride": 2}, "vision_remember": {"insert_after": (1, 3)}})
    assert (model.encoder, model.decoder, model.image) == (size.encoder, size.decoder, size.image)
    assert (model.refusion.levels, model.refusion.insert_after) == ((1, 2, 3), (1, 3))
    assert model.projector.stride == 2


def test_blocks_after_every_third_layer_follow_the_depth():
    row = find_row("table3", "sva_every_third")
    assert row.config(DECODERS["0.5b"], "anyres9").refusion.insert_after == (1, 4, 7, 10, 13, 16, 19, 22)


def test_a_pruner_brings_its_image_layout():
    row = find_row("table4", "vispruner")
    assert not row.config(DECODERS["0.5b"], "anyres9").image.unpad
    assert dataclasses.replace(row, pruning=None).config(DECODERS["0.5b"], "anyres9").image.unpad


def test_methods_that_do_not_fit_are_refused(size):
    with pytest.raises(ConfigError, match=r"stride = 4 does not divide the encoder's 6 x 6 patch grid"):
        System(title="", projector={"name": "pool", "stride": 4}).at(size)
    assert BASELINE.at(size).projector.stride == 3
