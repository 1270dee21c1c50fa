"""The registry of methods: names, duplicates and JSON."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from jax.sharding import PartitionSpec as P

from vr_jax import sharding
from vr_jax.errors import ConfigError
from vr_jax.model import registry
from vr_jax.model.projectors.pool import PoolConfig
from vr_jax.model.refusion.sva import SvaConfig
from vr_jax.model.registry import ProjectorConfig


def test_every_file_of_the_five_folders_is_found():
    assert {kind: registry.names(kind) for kind in registry.FOLDERS} == {
        "encoder": ["clip", "qwen2_5_vision", "siglip", "siglip_slices"],
        "projector": [
            "c_abstractor",
            "ldpv2",
            "merger",
            "mlp",
            "perceiver",
            "pixel_shuffle",
            "pool",
            "resampler",
            "token_packer",
        ],
        "decoder": ["transformer"],
        "refusion": ["deepstack", "sva", "vision_remember"],
        "pruning": ["fastv", "pyramid_drop", "vispruner"],
    }


def test_the_name_is_part_of_the_json_form():
    assert PoolConfig(stride=2).to_dict() == {"name": "pool", "stride": 2}
    assert ProjectorConfig.from_dict({"name": "pool", "stride": 2}) == PoolConfig(stride=2)
    assert PoolConfig.from_dict({"stride": 2}) == PoolConfig(stride=2)
    with pytest.raises(ConfigError, match=r"PoolConfig\.name = 'sva': PoolConfig is the projector 'pool'"):
        PoolConfig.from_dict({"name": "sva"})


def test_a_second_class_of_the_same_name_is_rejected():
    with pytest.raises(TypeError, match=r"the projector 'pool' exists already, it is vr_jax\..*PoolConfig"):

        class Other(ProjectorConfig, name="pool"):
            pass

    assert registry.method("projector", "pool") is PoolConfig


def test_the_same_name_of_another_kind_is_allowed():
    with registry.registered_temporarily():

        class Other(ProjectorConfig, name="sva"):
            pass

        assert registry.method("projector", "sva") is Other
        assert registry.method("refusion", "sva") is SvaConfig
    assert "sva" not in registry.names("projector")


def test_a_class_without_a_name_is_rejected():
    with pytest.raises(TypeError, match=r"Other has no name: write class .*Other\(\.\.\., name=\.\.\.\)"):

        class Other(ProjectorConfig):
            pass


def test_sharding_rules_are_those_of_the_method():
    with registry.registered_temporarily():

        @dataclass(frozen=True, kw_only=True)
        class Other(ProjectorConfig, name="other"):
            sharding_rules = ((r"novel", P(None, "fsdp")), (r".+\.conv\.bias", P("tensor")))

        assert sharding.param_spec("projector.novel", 2) == P(None, "fsdp")
        # C-Abstractor has another rule for the same parameter.
        with pytest.raises(sharding.ShardingError, match=r"2 rules .* of the projector 'other'"):
            sharding.param_spec("projector.a.conv.bias", 1)
    with pytest.raises(sharding.ShardingError, match=r"'projector\.novel' matches no rule"):
        sharding.param_spec("projector.novel", 2)
