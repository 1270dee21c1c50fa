"""Keeps what a benchmark script changes in its process from the other tests."""

import os

import jax
import pytest

CHANGED = ("jax_enable_compilation_cache", "jax_compilation_cache_dir")


@pytest.fixture(autouse=True)
def process_settings():
    """Restores the environment and the settings of JAX after each test."""
    environment = dict(os.environ)
    settings = {name: getattr(jax.config, name) for name in CHANGED}
    yield
    os.environ.clear()
    os.environ.update(environment)
    for name, value in settings.items():
        jax.config.update(name, value)


@pytest.fixture
def plain_children(monkeypatch):
    """Starts the processes of a script with one device and one thread, as on a small machine.

    This process keeps the eight devices of the suite.
    """
    jax.devices()  # JAX reads the flags when it makes its first device, which must not be after this.
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
