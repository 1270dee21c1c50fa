"""Memory and bandwidths of the chips that can be planned for; their peak FLOP/s are in `vr_jax.training.PEAK_FLOPS`.

Sources: the "System architecture" tables of docs.cloud.google.com/tpu/docs (v5e, v5p, v6e, tpu7x), and NVIDIA's data
sheets of the H100 SXM and the H200 SXM. These give the bandwidth of the interconnect for both directions together
(TPU: 600, 400, 1200, 800 and 1200 GB/s; NVLink 4: 900 GB/s), and a chip sends at half of it. DGX H100 and H200 have one
400 Gbit/s adapter per GPU. The network between TPU slices, the data center network, is from the same tables: 6.4 Tbit/s
for the 256 chips of a v5e pod, and 50, 100 and 100 Gbit/s per chip of v5p, v6e and TPU7x.
"""

from __future__ import annotations

from dataclasses import dataclass

from vr_jax.training import PEAK_FLOPS

GB, GIB = 1e9, 2**30


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One JAX device, which is a chip or one of the two cores of a TPU7x.

    Attributes:
        kind: JAX's `device_kind`, a key of `PEAK_FLOPS`.
        memory: Bytes that a program can use.
        hbm_bandwidth: Bytes per second that the chip reads or writes in its memory.
        interconnect: Bytes per second that it sends to its neighbours, over all links together.
        network: Bytes per second that it sends beyond that: a GPU to other hosts, a TPU to other slices.
    """

    kind: str
    memory: float
    hbm_bandwidth: float
    interconnect: float
    network: float

    @property
    def peak_flops(self) -> float:
        """The peak FLOP/s in bfloat16."""
        return PEAK_FLOPS[self.kind]


# The usable memory that libtpu reports is 0.25 GiB below the data sheet on v5e, and up to 1.25 GiB below it elsewhere.
CHIPS: dict[str, Chip] = {
    "v5e": Chip(
        kind="TPU v5 lite", memory=15.75 * GIB, hbm_bandwidth=819 * GB, interconnect=200 * GB, network=3.125 * GB
    ),
    "v5p": Chip(kind="TPU v5", memory=95 * GIB, hbm_bandwidth=2765 * GB, interconnect=600 * GB, network=6.25 * GB),
    "v6e": Chip(
        kind="TPU v6 lite", memory=31.25 * GIB, hbm_bandwidth=1638 * GB, interconnect=400 * GB, network=12.5 * GB
    ),
    "tpu7x": Chip(kind="TPU7x", memory=94.75 * GIB, hbm_bandwidth=3690 * GB, interconnect=300 * GB, network=6.25 * GB),
    "h100": Chip(kind="NVIDIA H100", memory=79 * GIB, hbm_bandwidth=3350 * GB, interconnect=450 * GB, network=50 * GB),
    "h200": Chip(kind="NVIDIA H200", memory=139 * GIB, hbm_bandwidth=4800 * GB, interconnect=450 * GB, network=50 * GB),
}
