"""Opens a topology by name, such as "4*v5e:16x16": devices that a program can be compiled for, held by nobody."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, Mesh

from vr_jax.errors import UserError
from vr_jax.plan import nvidia
from vr_jax.plan.chips import CHIPS, Chip

CPU = "cpu"
EXAMPLES = (
    "v5e:4x4, v5p:8x8x16, v6e:16x16, tpu7x:2x2x2, 4*v5e:16x16 (four slices), h200:1x32x8 (slices x hosts x GPUs), cpu:8"
)


@dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
        name: The name that the user gave.
        chip: The kind of chip, or None for this machine's CPU, whose limits are not known.
        devices: The devices, in the order that JAX has on such a machine.
        hosts: The number of hosts of GPUs, between which the network is slower; 1 for other chips.
        slices: The number of slices of TPUs, between which the network is slower, or of groups of CPU devices that
            play slices.
    """

    name: str
    chip: Chip | None
    devices: tuple[jax.Device, ...]
    hosts: int = 1
    slices: int = 1

    @property
    def platform(self) -> str:
        """The platform of the devices, as JAX names it."""
        return self.devices[0].platform

    def bandwidth(self, group: int, inner: int) -> float:
        """Returns the bytes per second that a chip can send within a group.

        Args:
            group: The number of chips in the group.
            inner: The size of the mesh axis whose chips are neighbours on one host.
        """
        assert self.chip is not None
        if self.hosts == 1:  # What crosses the network between slices of TPUs is counted apart.
            return self.chip.interconnect
        per_host = len(self.devices) // self.hosts
        if group <= inner > 1:
            return self.chip.interconnect
        # The members of the group on one host.
        members = max(1, per_host // inner)
        if group <= members:
            return self.chip.interconnect
        # A ring enters and leaves each host once, through the adapters of all its members together.
        return min(self.chip.interconnect, members * self.chip.network)


class Name(NamedTuple):
    """A topology's name in its parts: "4*v5e:16x16" is kind "v5e", shape (16, 16) and 4 slices."""

    kind: str
    shape: tuple[int, ...]
    slices: int


def parse(name: str) -> Name:
    """Splits a name into its parts.

    Raises:
        UserError: The chip is unknown, the shape is not one of the chip's, or the slices are no positive number.
    """
    times, star, one = name.rpartition("*")
    if star and (not times.isdecimal() or int(times) < 1):
        raise UserError(
            f"--topology={name}: expected a number of slices in front of '*', found {times!r}; e.g. {EXAMPLES}"
        )
    kind, colon, text = one.partition(":")
    kind = kind.lower()
    if kind not in (*CHIPS, CPU):
        raise UserError(f"--topology={name}: no chip {kind!r}; known: {', '.join((*CHIPS, CPU))}; e.g. {EXAMPLES}")
    if star and kind != CPU and not _is_tpu(kind):
        raise UserError(
            f"--topology={name}: the slices of GPUs are the first number of their shape, e.g. {kind}:2x16x8"
        )
    sizes = text.split("x")
    if not colon or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise UserError(f"--topology={name}: expected numbers of chips behind {kind!r}:, e.g. {EXAMPLES}")
    shape = tuple(int(size) for size in sizes)
    wanted = {CPU: 1, "v5e": 2, "v6e": 2}.get(kind, 3)
    if len(shape) != wanted:
        raise UserError(f"--topology={name}: {kind} has {wanted} axes, found {len(shape)}; e.g. {EXAMPLES}")
    return Name(kind, shape, int(times) if star else 1)


def _is_tpu(kind: str) -> bool:
    return CHIPS[kind].kind.startswith("TPU")


def prepare_process(name: str) -> None:
    """Sets what compilers read once, before the first of them is loaded, in a process that only plans.

    Raises:
        UserError: The topology does not exist, or its compiler is not installed.
    """
    kind, shape, slices = parse(name)
    jax.config.update("jax_platforms", "cpu")
    if kind == CPU:
        jax.config.update("jax_num_cpu_devices", slices * shape[0])
    elif _is_tpu(kind):
        _need("libtpu", "TPUs", "tpu")
        # Without these settings libtpu asks the metadata server of the cloud.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
        # No chip is opened, so several processes may load libtpu at the same time.
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    else:
        _need("jax_plugins", "NVIDIA GPUs", "cuda13")
        flags = os.environ.get("XLA_FLAGS", "")
        if "xla_gpu_cuda_data_dir" not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_cuda_data_dir={nvidia.cuda_directory()}".strip()


def _need(module: str, what: str, extra: str) -> None:
    if find_spec(module) is None:
        raise UserError(
            f"planning for {what} needs their compiler, which is not installed: pip install 'vr-jax[{extra}]'"
        )


def open_topology(name: str) -> Topology:
    """Returns the devices of a topology.

    Raises:
        UserError: The topology does not exist, or its compiler is not installed.
    """
    kind, shape, slices = parse(name)
    if kind == CPU:
        devices, wanted = jax.devices("cpu"), slices * shape[0]
        if len(devices) < wanted:
            raise UserError(f"--topology={name}: this process has {len(devices)} CPU devices")
        return Topology(name, None, tuple(devices[:wanted]), slices=slices)
    chip = CHIPS[kind]
    text = "x".join(map(str, shape))
    try:
        if _is_tpu(kind):
            _need("libtpu", "TPUs", "tpu")
            found = topologies.get_topology_desc(f"{kind}:{text}", "tpu", num_slices=slices)
            return Topology(name, chip, tuple(found.devices), slices=slices)
        _need("jax_plugins", "NVIDIA GPUs", "cuda13")
        found = topologies.get_topology_desc(
            platform="cuda", topology_name="", topology=text, target_config=nvidia.target_config(chip)
        )
        return Topology(name, chip, tuple(found.devices), hosts=math.prod(shape[:2]))
    except (jax.errors.JaxRuntimeError, RuntimeError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"--topology={name}: the compiler does not know it ({reason}); e.g. {EXAMPLES}") from error


@contextlib.contextmanager
def compiling_for(topology: Topology, mesh: Mesh) -> Iterator[None]:
    """Sets the mesh as it is on a machine that has these devices.

    Kernels are chosen by `device_kind`, which devices of NVIDIA lack ahead of time, so it is added to the mesh.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        if topology.platform == "gpu" and topology.chip is not None:
            device: Any = AbstractDevice(device_kind=topology.chip.kind, num_cores=None, platform="gpu")
            stack.enter_context(jax.sharding.use_abstract_mesh(mesh.abstract_mesh.update(abstract_device=device)))
        yield
