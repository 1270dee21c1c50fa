"""Every test runs on the CPU, which plays eight devices, so that sharding is tested on any machine."""

import os
from pathlib import Path

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["VR_JAX_NO_CACHE"] = "1"  # what a test compiles is its own
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # Tiny programs: compiling them takes far longer than running them, optimised or not.
        "--xla_backend_optimization_level=0",
    ]
).strip()

from tests import shape_checks  # after the settings above, which JAX reads when it is imported

shape_checks.install(Path(__file__).parents[1] / "vr_jax")


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """The same tiny program is compiled by many tests and by the processes that they start: once is enough."""
    import jax  # after the settings above

    directory = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        directory = directory.parent  # which the workers share
    settings = {
        "jax_compilation_cache_dir": str(directory / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name.upper(), str(value))
            jax.config.update(name, value)
        yield


def pytest_collection_modifyitems(items):
    """The longest files first, so that parallel runs end together."""
    items.sort(key=lambda item: "tests/training/" not in item.nodeid)
