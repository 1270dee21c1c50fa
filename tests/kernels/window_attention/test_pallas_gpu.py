"""The Mosaic GPU kernels: against float64 through Pallas' GPU interpreter, and compiled for an H200 that nobody has."""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from tests.tiny import quick
from vr_jax.kernels.window_attention import _gpu_plan, pallas_gpu


@dataclass(frozen=True)
class Case:
    windows: int
    keys: int
    heads: int
    absorbed: bool
    width: int
    dtype: str
    hidden: bool  # some keys are, in the first window all

    def arrays(self) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array]:
        """Query, key, value, valid, and the gradient of the output."""
        rng = np.random.default_rng(0)
        rows = (self.windows, self.heads, self.width)
        keys = (self.windows, self.keys, 1 if self.absorbed else self.heads, self.width)
        query, key, value, grad = (jnp.asarray(rng.normal(size=s), self.dtype) for s in (rows, keys, keys, rows))
        valid = rng.random(keys[:2]) < 0.5
        valid[0], valid[1] = False, True
        return query, key, key if self.absorbed else value, jnp.asarray(valid) if self.hidden else None, grad


SCALE = 0.125
ON_TENSOR_CORES = Case(5, 9, 24, True, 256, "bfloat16", True)
CASES = {
    "absorbed, tensor cores": ON_TENSOR_CORES,
    "absorbed, tensor cores, one consumer, nothing hidden": Case(3, 16, 8, True, 192, "bfloat16", False),
    "absorbed, vectors": Case(2, 4, 16, True, 256, "float32", True),
    "plain, bfloat16": Case(2, 9, 8, False, 128, "bfloat16", True),
    "plain, float32": Case(2, 16, 8, False, 32, "float32", True),
    "plain, nothing hidden": Case(2, 4, 8, False, 64, "float32", False),
}


@pytest.fixture
def small_and_strict(monkeypatch):
    """One multiprocessor, so that a block takes several groups of windows in turn; three barriers in an array, so that
    small cases have several chunks of columns behind each, as wide ones have behind Mosaic's 32; races are errors."""
    monkeypatch.setattr(pallas_gpu, "MULTIPROCESSORS", 1)
    monkeypatch.setattr(_gpu_plan, "MAX_BARRIERS", 3)
    strict = functools.partial(plgpu.InterpretGPUParams, detect_races=True)
    monkeypatch.setattr(plgpu, "InterpretGPUParams", strict)


def exact(case: Case) -> tuple[list[np.ndarray], list[np.ndarray], float]:
    """Output, query's gradient, weights, gradient by the products, in float64; for each number the sum of the
    magnitudes that it is made of; the largest such sum of a logit."""
    query, key, value, valid, grad = case.arrays()
    query, key, value, grad = (np.asarray(x, np.float64) for x in (query, key, value, grad))
    key, value = (np.broadcast_to(x, (*x.shape[:2], case.heads, case.width)) for x in (key, value))
    seen = np.ones((case.windows, 1, case.keys), bool) if valid is None else np.asarray(valid)[:, None, :]
    logits = np.where(seen, np.einsum("whd,wshd->whs", query, key) * SCALE, -np.inf)
    weights = np.where(seen, np.exp(logits - np.where(seen.any(-1), logits.max(-1), 0)[..., None]), 0)
    weights = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300)

    def results(key, value, grad, sign):
        change = np.einsum("whd,wshd->whs", grad, value)
        products_grad = weights * (change - sign * np.sum(weights * change, -1, keepdims=True)) * SCALE
        sums = (np.einsum("whs,wshd->whd", *pair) for pair in ((weights, value), (products_grad, key)))
        return [*sums, weights, products_grad]

    magnitudes = [np.abs(x) for x in (key, value, grad)]
    logit = np.einsum("whd,wshd->whs", np.abs(query), magnitudes[0]).max() * SCALE
    return results(key, value, grad, 1), results(*magnitudes, -1), logit


def check(case: Case) -> list[np.ndarray]:
    query, key, value, valid, grad = case.arrays()
    assert pallas_gpu.unsupported(query, key, value) is None
    out = pallas_gpu.forward(query, key, value, valid, SCALE, interpret=True)
    found = [out, *pallas_gpu.query_gradient(query, key, value, valid, grad, SCALE, interpret=True)]
    assert [x.dtype.name for x in found] == [case.dtype] * 2 + ["float32"] * 2
    found = [np.asarray(x, np.float64) for x in found]
    expected, magnitudes, logit = exact(case)
    # A logit's rounding is a relative error of the weights. In bfloat16 the factors of the second product and its
    # result are rounded, each by 2 ** -8 at most.
    single = 2**-22 * (1 + logit)
    half = 2**-7 * (1 + 2**-8) if case.dtype == "bfloat16" else 0
    for n, (one, other, magnitude) in enumerate(zip(found, expected, magnitudes, strict=True)):
        assert one.shape == other.shape
        rounding = single + (half if n < 2 else 0)
        np.testing.assert_array_less(np.abs(one - other), rounding * magnitude + 1e-12, err_msg=str(n))
    if case.hidden:
        assert not any(x[0].any() for x in found)  # nothing to see: zeros, exactly
        assert all(x[1].any() for x in found)
    return found


@pytest.mark.usefixtures("small_and_strict")
# The interpreter of the kernels takes seconds for a case.
@pytest.mark.parametrize("name", quick(CASES, "absorbed, tensor cores", "plain, bfloat16", "plain, nothing hidden"))
def test_matches_float64(name: str):
    check(CASES[name])


def test_other_chips_do_without_hoppers_instructions(monkeypatch):
    """wgmma exists on compute capability 9 only; the dtype alone does not decide."""
    query, key, *_ = ON_TENSOR_CORES.arrays()
    assert pallas_gpu.plan_for(query, key, False).tensor_cores
    monkeypatch.setattr(pallas_gpu, "compute_capability", lambda: (10, 0))
    assert not pallas_gpu.plan_for(query, key, False).tensor_cores
    assert pallas_gpu.unsupported(query, key, key) is None
    monkeypatch.setattr(pallas_gpu, "compute_capability", lambda: (8, 0))
    assert "compute capability 8.0" in pallas_gpu.unsupported(query, key, key)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("keys", [4, 9, 16])
def test_plan_holds_every_key(keys: int, dtype: str, backward: bool):
    """The shapes that matter fit, and the rows that a group loads, from an aligned one, hold its keys."""
    plan = _gpu_plan.Plan(20_481, 24, keys, 3072, jnp.dtype(dtype), backward, dtype == "bfloat16")
    assert _gpu_plan.unsupported(plan) is None
    assert plan.groups * plan.group >= 20_481 > (plan.groups - 1) * plan.group
    assert plan.rows <= plan.product_rows
    assert plan.parts * plan.per_part * plan.chunk == 3072
    for first in range(0, 8 * plan.group * keys, plan.group * keys):
        aligned = first // plan.align * plan.align
        assert first + plan.group * keys <= aligned + plan.stride()
    assert plan.stride() % plan.align == 0
    assert plan.stride() <= _gpu_plan.TILE


def shaped(*shape: int, dtype: str = "bfloat16") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


SHARED = shaped(4, 9, 1, 3072)


@pytest.mark.parametrize(
    ("query", "key", "value", "reason"),
    [
        (shaped(4, 24, 128), shaped(4, 9, 24, 128), shaped(4, 9, 24, 128, dtype="float32"), "dtypes"),
        (shaped(4, 24, 128), shaped(4, 9, 24, 128), shaped(4, 9, 24, 64), "128 and value width 64 differ"),
        (shaped(4, 6, 128), shaped(4, 9, 6, 128), shaped(4, 9, 6, 128), "6 heads, expected a multiple of 8"),
        (shaped(4, 8, 100), shaped(4, 9, 8, 100), shaped(4, 9, 8, 100), "head width 100, expected a multiple of 16"),
        (shaped(4, 8, 512), shaped(4, 9, 8, 512), shaped(4, 9, 8, 512), "head width 512"),
        (shaped(4, 8, 256), shaped(4, 64, 8, 256), shaped(4, 64, 8, 256), "64 keys need"),
        (shaped(4, 24, 3072), SHARED, shaped(4, 9, 1, 3072), "pass one array as both"),
        (shaped(4, 20, 3072), SHARED, SHARED, "20 heads with shared keys"),
        (shaped(4, 24, 3072), *[shaped(4, 36, 1, 3072)] * 2, "36 keys of width 3072"),
        (shaped(4, 24, 3100), *[shaped(4, 9, 1, 3100)] * 2, "width 3100 of shared keys is not a multiple of 64"),
        (shaped(0, 24, 3072), *[shaped(0, 9, 1, 3072)] * 2, "empty"),
    ],
)
def test_refusals_name_the_reason(query, key, value, reason: str):
    assert reason in pallas_gpu.unsupported(query, key, value)


COMPILE = '''
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec as P
from vr_jax.kernels.window_attention import pallas_gpu

H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 } core_count: 132 threads_per_warp: 32 fpus_per_core: 128
  threads_per_block_limit: 1024 threads_per_core_limit: 2048 registers_per_core_limit: 65536
  registers_per_block_limit: 65536 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 l2_cache_size: 62914560 clock_rate_ghz: 1.98
  memory_bandwidth: 4800000000000 device_memory_size: 149000000000
}
platform_name: "CUDA"
"""
topology = topologies.get_topology_desc(platform="cuda", topology_name="", topology="1x1x1", target_config=H200)
mesh = Mesh(np.array(topology.devices), ("x",), axis_types=(AxisType.Auto,))
device = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
abstract = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)


def array(*shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))


def compile(windows, keys, heads, shared, width, dtype, hidden, backward):
    query = array(windows, heads, width, dtype=dtype)
    key = array(windows, keys, 1 if shared else heads, width, dtype=dtype)
    valid = array(windows, keys, dtype=jnp.bool_) if hidden else None

    def run(query, key, value, valid, grad):
        value = key if shared else value
        if backward:
            return pallas_gpu.query_gradient(query, key, value, valid, grad, 0.1, interpret=False)
        return pallas_gpu.forward(query, key, value, valid, 0.1, interpret=False)

    with jax.sharding.use_abstract_mesh(abstract):
        lowered = jax.jit(run).lower(query, key, key, valid, query)
    assert "mosaic_gpu" in lowered.compile().as_text()


for dtype in ("bfloat16", "float32"):
    for shared, width in ((True, 3072), (False, 128)):
        for keys in (4, 9, 16):
            for backward in (False, True):
                case = (20480, keys, 24, shared, width, dtype, backward, backward)
                compile(*case)
                print("compiled", *case)
compile(405, 9, 24, True, 3072, "bfloat16", True, False)  # rows of features that are no whole tiles
compile(3, 4, 8, True, 64, "bfloat16", True, True)
'''


def cuda_toolkit() -> Path | str:
    """The CUDA toolkit's folder among the installed packages, or why there is nothing to compile with."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        return "needs the CUDA plugin of JAX (pip install 'jax[cuda13]'): jax_cuda13_plugin is not installed"
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(root) / "cu13" for root in (spec.submodule_search_locations if spec else ())]
    found = [root for root in roots if (root / "bin" / "ptxas").is_file()]
    return found[0] if found else "needs NVIDIA's assembler (pip install 'jax[cuda13]'): no nvidia/cu13/bin/ptxas"


@pytest.mark.slow  # It compiles for half a minute.
def test_compiles_for_h200():
    """Through ptxas, forward and gradient, in both forms and types; in a process of its own, which sees no other
    devices."""
    toolkit = cuda_toolkit()
    if isinstance(toolkit, str):
        pytest.skip(toolkit)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_gpu_cuda_data_dir={toolkit}"}
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, cwd=root, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
    assert done.stdout.count("compiled") == 24
