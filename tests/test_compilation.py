"""The cache of compiled programs: where it is, what switches it off, and that a second process compiles nothing."""

import json
import os
import subprocess
import sys

import jax
import pytest

from vr_jax.compilation import MAX_BYTES, MIN_SECONDS, OFF_VARIABLE, use_compilation_cache

NAMES = ("dir", "max_size")
SETTINGS = (*(f"jax_compilation_cache_{name}" for name in NAMES), "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """Switched on for one test, which must not compile, with nothing set but where the user's caches are."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    for name in SETTINGS:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.delenv(OFF_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", None)
    yield monkeypatch
    for name, value in before.items():
        jax.config.update(name, value)


def settings():
    return [getattr(jax.config, name) for name in SETTINGS]


def test_it_is_in_the_users_cache(cache, tmp_path):
    directory = str(tmp_path / "vr_jax" / "compiled")
    assert use_compilation_cache() == directory
    assert settings() == [directory, MAX_BYTES, MIN_SECONDS]
    assert os.stat(directory).st_mode & 0o077 == 0, "others could put code there"
    cache.delenv("XDG_CACHE_HOME")
    cache.setenv("HOME", str(tmp_path / "home"))
    jax.config.update("jax_compilation_cache_dir", None)
    assert use_compilation_cache() == str(tmp_path / "home" / ".cache" / "vr_jax" / "compiled")


def test_what_the_user_set_stays(cache):
    jax.config.update("jax_compilation_cache_dir", "gs://bucket/folder")
    for name, value in {SETTINGS[1]: -1, SETTINGS[2]: 7.0}.items():
        cache.setenv(name.upper(), str(value))
        jax.config.update(name, value)
    assert use_compilation_cache() == "gs://bucket/folder"
    assert settings() == ["gs://bucket/folder", -1, 7.0]


def test_it_can_be_switched_off(cache):
    cache.setenv(OFF_VARIABLE, "1")
    assert use_compilation_cache() is None
    cache.setenv(OFF_VARIABLE, "0")
    jax.config.update("jax_enable_compilation_cache", False)
    assert use_compilation_cache() is None
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", "")
    assert use_compilation_cache() is None


def test_a_folder_that_cannot_be_made_is_no_error(cache, tmp_path, caplog):
    (tmp_path / "file").touch()
    cache.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert use_compilation_cache() is None
    assert "compiled anew in each run" in caplog.text
    assert jax.config.jax_compilation_cache_dir is None


COUNT = """
import json, jax, jax.numpy as jnp
from vr_jax.compilation import use_compilation_cache
counts = {"compile_requests_use_cache": 0, "cache_hits": 0}
def count(event, **_):
    name = event.rsplit("/", 1)[1]
    if name in counts:
        counts[name] += 1
jax.monitoring.register_event_listener(count)
use_compilation_cache()
jax.jit(lambda x: jnp.sort(jnp.tanh(x @ x)).sum())(jnp.ones((8, 8))).block_until_ready()
print(json.dumps(counts))
"""


@pytest.mark.slow  # Two processes start and compile.
def test_a_second_process_compiles_nothing(tmp_path):
    environment = {name: value for name, value in os.environ.items() if "CACHE" not in name}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

    def run():
        done = subprocess.run(
            [sys.executable, "-c", COUNT], env=environment, capture_output=True, text=True, timeout=120, check=True
        )
        return json.loads(done.stdout), done.stderr

    (first, _), (second, messages) = run(), run()
    assert first["compile_requests_use_cache"] > first["cache_hits"]
    assert second["compile_requests_use_cache"] == second["cache_hits"] > 0
    assert not messages
    # A file that was cut off, as by a full disk, costs a compilation and a warning.
    for entry in (tmp_path / "vr_jax" / "compiled").glob("*-cache"):
        entry.write_bytes(entry.read_bytes()[:50])
    third, messages = run()
    assert third["cache_hits"] == 0
    assert "Error reading persistent compilation cache entry" in messages
