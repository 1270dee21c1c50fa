"""The TPU kernel compiled for real TPUs, ahead of time and with no device: it compiles, and moves no byte twice."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
GENERATIONS = ("v5e", "v5p", "v6e")

# In a process of its own: libtpu is no part of the other tests, which play eight CPU devices.
COMPILE = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from benchmarks.kernels.window_attention import compiled_bytes
from vr_jax.kernels.window_attention import window_attention

def compiles(windows, keys, heads, own_keys, dtype, width=128):
    def run(query, key, valid, grad):
        attend = lambda query, key: window_attention(query, key, key, valid, backend="pallas_tpu")
        out, pull = jax.vjp(attend, query, key)
        return out, pull(grad)
    query, key = (windows, heads, width), (windows, keys, heads if own_keys else 1, width)
    shapes = [(query, dtype), (key, dtype), (key[:2], bool), (query, dtype)]
    jax.jit(run).lower(*[jax.ShapeDtypeStruct(s, t, sharding=where) for s, t in shapes]).compile()
    return [windows, keys, heads, own_keys, dtype.__name__]

found = compiled_bytes(sys.argv[1].split(","))
mesh = Mesh(np.array(topologies.get_topology_desc("v5e:2x2", "tpu").devices[:1]), ("all",))
where = NamedSharding(mesh, PartitionSpec())
with jax.set_mesh(mesh):
    small = [compiles(21, keys, 3, own_keys, dtype)
             for keys, own_keys, dtype in ((4, False, jnp.float32), (16, False, jnp.bfloat16),
                                           (9, True, jnp.float32), (4, True, jnp.bfloat16))]
    adaptive = [compiles(64, 48, 27, own_keys, jnp.bfloat16, width)
                for own_keys, width in ((False, 3456), (True, 128))]
print(json.dumps({"paper": found, "small": small, "adaptive": adaptive}))
"""


@pytest.fixture(scope="module")
def compiled() -> dict:
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: pip install libtpu, to compile for TPUs with no device")
    ours = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    ours["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # other tests may compile at the same time
    # The suite's flags are for CPU programs, and a cache would give back programs without their text.
    kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, ",".join(GENERATIONS)],
        cwd=ROOT,
        env={**kept, **ours, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("part", ["forward", "gradient"])
@pytest.mark.parametrize("form", ["absorbed", "plain"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_one_pass(compiled: dict, generation: str, form: str, part: str):
    """20,480 windows of 9 keys, 24 heads, 3072 wide absorbed and 128 plain, bfloat16: arguments and results are what
    one pass must move, nothing is laid out anew beside them, and a step fits in a TPU's default VMEM for a kernel."""
    key = {"generation": generation, "form": form, "part": part}
    (one,) = [found for found in compiled["paper"] if key.items() <= found.items()]
    assert one["hbm_bytes"] == pytest.approx(one["floor_bytes"], rel=1e-3)
    assert one["temporary_bytes"] <= 0.01 * one["floor_bytes"]
    assert 0 < one["vmem_bytes"] <= 16 * 2**20


def test_hidden_keys_and_a_part_of_a_block(compiled: dict):
    """21 windows, 4, 9 or 16 keys, 3 heads, both forms, both dtypes, some keys hidden."""
    assert len(compiled["small"]) == 4


def test_adaptive_windows_of_minicpm_v(compiled: dict):
    """64 windows of 48 slots, of which some are hidden, 27 heads, 3456 wide absorbed and 128 plain, bfloat16."""
    assert len(compiled["adaptive"]) == 2
