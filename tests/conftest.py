"""Every test runs on the CPU, which plays eight devices, so that sharding is tested on any machine."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # Tiny programs: compiling them takes far longer than running them, optimised or not.
        "--xla_backend_optimization_level=0",
    ]
).strip()
