"""Settings of the whole suite: the platform, eight simulated devices, checked shape annotations, shared compilations.

Tests run on the CPU unless JAX_PLATFORMS names another platform. The CPU plays eight devices, so that sharding is
tested on any machine. Tests marked `gpu` or `tpu` need such a device and are skipped elsewhere.
"""

import os
import secrets
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["VR_JAX_NO_CACHE"] = "1"  # A test must not depend on what an earlier run compiled.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # Compiling tiny programs takes far longer than running them, optimised or not.
        "--xla_backend_optimization_level=0",
    ]
).strip()

from tests import shape_checks  # The import follows the settings above, which JAX reads when it is imported.

shape_checks.install(Path(__file__).parents[1] / "vr_jax")

# For each marker of a platform: what it needs, and the value of JAX_PLATFORMS that runs it.
PLATFORMS = {"gpu": ("an NVIDIA GPU", "cuda"), "tpu": ("a TPU", "tpu")}


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """Shares compiled programs between the tests of a session and the processes that they start."""
    import jax  # The import follows the settings above.

    directory = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        directory = directory.parent  # The workers share this folder.
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


@pytest.fixture(scope="session")
def object_store():
    """A store of objects in a process of its own (tests/object_store.py)."""
    pytest.importorskip("gcsfs", reason="gs:// needs gcsfs")
    pytest.importorskip("gcp_storage_emulator", reason="the tests' store is gcp-storage-emulator")
    from tests.object_store import started

    with started() as store:
        yield store


@pytest.fixture
def bucket(object_store, monkeypatch):
    """A folder of a bucket that no other test uses; the store has no faults."""
    from tests.object_store import BUCKET
    from vr_jax.storage import as_path

    object_store.inject()
    for name, value in object_store.environment.items():
        monkeypatch.setenv(name, value)
    return as_path(f"gs://{BUCKET}/{secrets.token_hex(6)}")


def pytest_collection_modifyitems(items):
    """Puts the longest files first, so that the workers of a parallel run end together."""
    items.sort(key=lambda item: "tests/training/" not in item.nodeid)


def pytest_runtest_setup(item):
    """Skips a test that is marked for a platform which this session does not run on."""
    for marker, (needed, setting) in PLATFORMS.items():
        if item.get_closest_marker(marker) is not None:
            import jax

            if jax.default_backend() != marker:
                pytest.skip(
                    f"needs {needed}, and this session runs on the platform {jax.default_backend()!r}; "
                    f"where there is one: JAX_PLATFORMS={setting} python -m pytest -m {marker}"
                )


def order_passes_as_pillow_13(patch: pytest.MonkeyPatch) -> None:
    """Gives Pillow's own `resize` the order of passes of version 13, for references that call it.

    Older versions resize along the rows first, always. Our code makes the passes one by one, so this changes nothing
    in it.
    """
    import PIL
    from PIL import Image

    if int(PIL.__version__.partition(".")[0]) >= 13:
        return
    one_version = Image.Image.resize

    def resize(self, size, resample=None, box=None, reducing_gap=None):
        (width, height), (new_width, new_height) = self.size, size
        if box is None and new_height < height and height - new_height > 2 * (width - new_width):
            self = one_version(self, (width, new_height), resample)
        return one_version(self, size, resample, box, reducing_gap)

    patch.setattr(Image.Image, "resize", resize)


@pytest.fixture
def pillow_13(monkeypatch):
    """Pillow resizes in the order of passes of version 13, for one test."""
    order_passes_as_pillow_13(monkeypatch)


@pytest.fixture(scope="module")
def pillow_13_in_module():
    """Pillow resizes in the order of passes of version 13, for the references that a fixture of a module computes."""
    with pytest.MonkeyPatch.context() as patch:
        order_passes_as_pillow_13(patch)
        yield
