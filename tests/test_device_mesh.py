"""Meshes: sizes that are given or chosen by the rule, and devices of one slice or of several."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.experimental import mesh_utils

from vr_jax import sharding
from vr_jax.device_mesh import choose_mesh, slice_groups


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"fsdp": 3}, r"fsdp=3 .* needs 3 devices, found 8"),
        ({"fsdp": -1, "tensor": 3}, "a multiple of 3 devices, found 8"),
        ({"fsdp": -1, "tensor": -1}, "at most one may be -1"),
        ({"replica": -1, "fsdp": -1, "tensor": 3}, "a tensor that divides the 8 devices"),
        ({"fsdp": 0}, "must be positive"),
    ],
)
def test_a_mesh_that_does_not_fit_says_so_in_one_line(sizes, message):
    with pytest.raises(sharding.ShardingError, match=message) as error:
        sharding.make_mesh(**sizes)
    assert "\n" not in str(error.value)


def test_minus_one_takes_the_remaining_devices():
    assert dict(sharding.make_mesh(replica=2, fsdp=-1, tensor=2).shape) == {"replica": 2, "fsdp": 2, "tensor": 2}


class _OnSlice:
    """A device of a TPU slice, as far as the construction of a mesh looks."""

    def __init__(self, device, slice_index):
        self.device, self.slice_index = device, slice_index

    def __getattr__(self, name):
        return getattr(self.device, name)


def test_slices_meet_on_the_outermost_axis_that_allows_it():
    devices = [_OnSlice(d, i % 2) for i, d in enumerate(jax.devices())]

    def slices(*shape):
        grid = sharding.make_mesh(*shape, devices=devices).devices
        return np.vectorize(lambda d: d.slice_index)(grid).reshape(2, 4)

    for shape in [(2, 4, 1), (2, 2, 2), (1, 4, 2)]:
        np.testing.assert_array_equal(slices(*shape), [[0] * 4, [1] * 4])
    with pytest.raises(sharding.ShardingError, match="replica or fsdp must be a multiple of 2"):
        sharding.make_mesh(1, 1, 8, devices=devices)


@dataclasses.dataclass(frozen=True)
class _Chip:
    """A chip of a v5p torus of 4 x 4 x 4."""

    id: int
    platform: str = "tpu"
    device_kind: str = "TPU v5"
    process_index: int = 0
    core_on_chip: int = 0
    slice_index: int = 0

    @property
    def coords(self):
        return self.id % 4, self.id // 4 % 4, self.id // 16


def test_a_mesh_axis_may_be_part_of_a_torus_axis():
    """8 = 4 x half of 4: jax.make_mesh alone refuses."""
    mesh = sharding.make_mesh(8, 8, 1, devices=[_Chip(i) for i in range(64)])
    assert dict(mesh.shape) == {"replica": 8, "fsdp": 8, "tensor": 1}
    assert {chip.id for chip in mesh.devices.flat} == set(range(64))


def test_the_order_of_the_groups_is_that_of_create_hybrid_device_mesh():
    devices = [_OnSlice(d, i % 2) for i, d in enumerate(jax.devices())]
    expected = mesh_utils.create_hybrid_device_mesh((1, 2, 2), (2, 1, 1), devices)
    assert (sharding.make_mesh(2, 2, 2, devices=devices).devices == expected).all()


def test_devices_that_tell_no_slice_play_slices():
    found = choose_mesh(2, 4, 1, slices=2)
    assert (found.slices, found.across) == (2, "replica")
    assert [d.id for d in found.mesh.devices[1].flat] == [4, 5, 6, 7]
    assert "summed once per update" in found.rule
    across = choose_mesh(1, 8, 1, slices=2)
    assert across.across == "fsdp"
    assert "config.mesh.replica that is a multiple" in across.rule


@pytest.mark.parametrize(
    ("count", "slices", "message"),
    [
        (8, 3, "config.mesh.slices = 3 does not divide the 8 devices"),
        (8, 4, "config.mesh.slices = 4, and the devices are on 2 slices"),
        (7, 0, "the slices have 4, 3 devices"),
    ],
)
def test_slices_that_do_not_fit_are_refused(count, slices, message):
    devices = [_OnSlice(d, i % 2) if slices != 3 else d for i, d in enumerate(jax.devices()[:count])]
    with pytest.raises(sharding.ShardingError, match=message) as error:
        slice_groups(devices, slices)
    assert "\n" not in str(error.value)


class TestRule:
    """`replica` and `fsdp` are left open."""

    @staticmethod
    def chosen(*widths, tensor=1, slices=0):
        tree = {f"projector.{i}.fc1.kernel": jax.ShapeDtypeStruct((w, 16), "float32") for i, w in enumerate(widths)}
        return choose_mesh(-1, -1, tensor, slices=slices, uneven=lambda mesh: sharding.unsharded(tree, mesh))

    @pytest.mark.parametrize(
        ("widths", "options", "shape"),
        [
            ((16,), {}, (1, 8, 1)),
            ((16, 12), {}, (2, 4, 1)),
            ((16, 6), {}, (4, 2, 1)),
            ((15,), {}, (8, 1, 1)),
            ((16,), {"slices": 2}, (2, 4, 1)),
            ((16, 6), {"slices": 2}, (4, 2, 1)),
            ((16,), {"tensor": 2}, (1, 4, 2)),
            ((16,), {"tensor": 2, "slices": 2}, (2, 2, 2)),
        ],
    )
    def test_fsdp_is_the_largest_that_divides_the_widths_and_fits_a_slice(self, widths, options, shape):
        assert tuple(self.chosen(*widths, **options).mesh.shape.values()) == shape

    def test_the_rule_is_told(self):
        assert self.chosen(16).rule == "by the rule: fsdp = 8, all devices; replica takes the rest"
        assert self.chosen(16, 6).rule == (
            "by the rule: fsdp = 2, the largest divisor of the 8 devices that divides the widths of all parameters "
            "(not projector.1.fc1.kernel (6, 16): axis 0 is not divisible by fsdp=4); replica takes the rest"
        )
        assert "all devices of a slice; replica takes the rest; replica crosses" in self.chosen(16, slices=2).rule

    def test_without_parameters_fsdp_takes_a_slice(self):
        assert tuple(sharding.make_mesh(-1, -1, slices=2).shape.values()) == (2, 4, 1)

    def test_tensor_has_to_divide_the_devices_of_a_slice(self):
        with pytest.raises(sharding.ShardingError, match="tensor that divides the 4 devices of a slice"):
            self.chosen(16, tensor=8, slices=2)
