"""Describes NVIDIA GPUs to XLA, so that it compiles for them without a device, and finds the tools that it needs.

The fields are those of `GpuTargetConfigProto` (`openxla/xla:xla/stream_executor/device_description.proto`). Their
values come from the CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability" (9.0), and from
the data sheets of the H100 SXM and the H200 SXM (132 multiprocessors, boost clock 1.98 GHz, 50 and 60 MiB of L2 cache).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from vr_jax.errors import UserError
from vr_jax.plan.chips import Chip

_L2_CACHE = {"NVIDIA H100": 50 * 2**20, "NVIDIA H200": 60 * 2**20}

_TARGET = """gpu_device_info {{
  cuda_compute_capability {{ major: 9 minor: 0 }}
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  memory_bandwidth: {bandwidth}
  device_memory_size: {memory}
  l2_cache_size: {l2_cache}
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
"""


def target_config(chip: Chip) -> str:
    """Returns the description of a Hopper GPU in XLA's text format."""
    return _TARGET.format(bandwidth=round(chip.hbm_bandwidth), memory=round(chip.memory), l2_cache=_L2_CACHE[chip.kind])


def cuda_directory() -> Path:
    """Returns the folder that contains `bin/ptxas` of the package nvidia-cuda-nvcc.

    Raises:
        UserError: The package is not installed.
    """
    found = importlib.util.find_spec("nvidia")
    for place in (found.submodule_search_locations or []) if found is not None else []:
        for compiler in sorted(Path(place).glob("*/bin/ptxas")):
            return compiler.parent.parent
    raise UserError("planning for NVIDIA needs its compiler, which is not installed: pip install 'vr-jax[cuda13]'")
