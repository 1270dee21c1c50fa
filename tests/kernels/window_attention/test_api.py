"""Windowed cross-attention, every backend that runs on a CPU, against float64 formulas: values and gradients."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh

from tests.tiny import quick
from vr_jax.errors import ConfigError
from vr_jax.kernels.window_attention import api, window_attention
from vr_jax.model.refusion import interactions
from vr_jax.model.refusion.interactions import LocalAttention
from vr_jax.sharding import make_mesh, sum_over_replicas

BACKENDS = ("reference", "pallas_tpu")  # pallas_gpu: test_pallas_gpu.py


@dataclass(frozen=True)
class Case:
    windows: int = 5
    keys: int = 9
    heads: int = 2
    own_keys: bool = False  # of each head, or of all heads together
    shared: bool = False  # the keys are the values
    width: int = 128
    dtype: str = "float32"
    hidden: bool = True  # some keys are, in one window all
    scale: float | None = None

    def arrays(self) -> list[np.ndarray]:
        """Query, key, value, valid, and the gradient of the output, float64 numbers that the dtype holds exactly."""
        rng = np.random.default_rng(0)
        keys = (self.windows, self.keys, self.heads if self.own_keys else 1, self.width)
        rows = (self.windows, self.heads, self.width)
        query, key, value, grad = (
            np.asarray(jnp.asarray(rng.normal(size=shape), self.dtype), np.float64)
            for shape in (rows, keys, keys, rows)
        )
        valid = rng.random(keys[:2]) < 0.5 if self.hidden else np.ones(keys[:2], bool)
        if self.hidden:
            valid[0], valid[-1] = True, False
        return [query, key, key if self.shared else value, valid, grad]


@dataclass(frozen=True)
class Result:
    out: np.ndarray
    query: np.ndarray
    key: np.ndarray  # with value's, where they are one array
    value: np.ndarray


def exact(case: Case) -> tuple[Result, Result, float]:
    """The formulas in float64; for each number the sum of the magnitudes that it is made of; the largest such sum of a
    logit."""
    query, key, value, valid, grad = case.arrays()
    scale = case.width**-0.5 if case.scale is None else case.scale
    key, value = (np.broadcast_to(x, (*x.shape[:2], case.heads, x.shape[3])) for x in (key, value))
    seen = valid[:, None, :]
    logits = np.where(seen, np.einsum("whd,wshd->whs", query, key) * scale, -np.inf)
    weights = np.where(seen, np.exp(logits - np.where(seen.any(-1), logits.max(-1), 0)[..., None]), 0)
    weights = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300)

    def gradients(query, key, value, grad, sign):
        change = np.einsum("whd,wshd->whs", grad, value)
        logits_grad = weights * (change - sign * np.sum(weights * change, -1, keepdims=True)) * scale
        by_query = np.einsum("whs,wshd->whd", logits_grad, key)
        by_key, by_value = (np.einsum("whs,whd->wshd", *pair) for pair in ((logits_grad, query), (weights, grad)))
        if not case.own_keys:
            by_key, by_value = (x.sum(2, keepdims=True) for x in (by_key, by_value))
        out = np.einsum("whs,wshd->whd", weights, value)
        return Result(out, by_query, by_key + by_value if case.shared else by_key, by_value)

    magnitudes = [np.abs(x) for x in (query, key, value, grad)]
    logit = np.einsum("whd,wshd->whs", *magnitudes[:2]).max() * scale
    return gradients(query, key, value, grad, 1), gradients(*magnitudes, -1), logit


def computed(case: Case, backend: str) -> Result:
    query, key, value, valid, grad = case.arrays()
    *arrays, grad = (jnp.asarray(x, case.dtype) for x in (query, key, value, grad))
    valid = jnp.asarray(valid) if case.hidden else None

    @jax.jit
    def run(arrays, grad):
        def attend(query, key, value):
            value = key if case.shared else value
            options = {"scale": case.scale, "backend": backend, "interpret": True}
            return window_attention(query, key, value, valid, **options)

        out, pull = jax.vjp(attend, *arrays)
        return out, *pull(grad)

    return Result(*(np.asarray(x, np.float64) for x in run(arrays, grad)))


def check(case: Case, backend: str) -> Result:
    found = computed(case, backend)
    expected, magnitude, logit = exact(case)
    # Rounded to bfloat16 (by 2 ** -8) on the way are at most: the weights, their gradient, and the result. In float32 a
    # logit's own rounding is the largest: the softmax makes it a relative error.
    rounding = 3 * 2**-8 if case.dtype == "bfloat16" else 2**-22 * (1 + logit)
    for name in ("out", "query", "key") if case.shared else ("out", "query", "key", "value"):
        one, other = getattr(found, name), getattr(expected, name)
        assert one.shape == other.shape
        np.testing.assert_array_less(np.abs(one - other), rounding * getattr(magnitude, name) + 1e-12, err_msg=name)
    return found


@pytest.mark.parametrize("backend", quick(BACKENDS, "reference"))
@settings(max_examples=8, derandomize=True, deadline=None)
@given(
    case=st.builds(
        Case,
        windows=st.integers(1, 19),
        keys=st.sampled_from([1, 4, 9, 16, 5]),
        heads=st.integers(1, 3),
        own_keys=st.booleans(),
        shared=st.booleans(),
        dtype=st.sampled_from(["float32", "bfloat16"]),
        hidden=st.booleans(),
        scale=st.sampled_from([None, 0.3]),
    )
)
def test_random_shapes(backend: str, case: Case):
    check(case, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("own_keys", [False, True])
def test_hidden_keys_and_windows(backend: str, own_keys: bool):
    """Eleven windows: not a multiple of a block. The last window sees nothing."""
    case = Case(windows=11, keys=4, own_keys=own_keys, shared=not own_keys)
    found = check(case, backend)
    for gradient in (found.out, found.query, found.key):
        assert not gradient[-1].any()
        assert gradient[0].any()
    hidden = ~case.arrays()[3]
    assert hidden[1:-1].any()
    assert not found.key[hidden].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("own_keys", [False, True])
def test_windows_with_many_slots(backend: str, own_keys: bool):
    """As those of MiniCPM-V's slices: 48 slots, of which about half hold a patch, and 27 heads with shared keys."""
    check(Case(windows=9, keys=48, heads=2 if own_keys else 27, own_keys=own_keys, shared=not own_keys), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_softmax_is_float32(backend: str):
    """Logits around 160 lose their differences in bfloat16 (steps of 1)."""
    unit = jnp.zeros(128, jnp.bfloat16).at[0].set(1)
    query, ones = unit[None, None], jnp.ones(128, jnp.bfloat16)
    key = jnp.stack([16.0 * unit, 16.125 * unit])[None, :, None]
    value = jnp.stack([0 * ones, ones])[None, :, None]
    found = window_attention(query, key, value, scale=10.0, backend=backend, interpret=True)
    assert float(found[0, 0, 0]) == pytest.approx(1 / (1 + np.exp(-1.25)), abs=4e-3)


@pytest.mark.parametrize(
    ("own_keys", "windows", "heads"),
    # The second case is divided over the devices as the first is, and has keys of its own as the third has.
    [(False, 16, 2), pytest.param(True, 16, 2, marks=pytest.mark.slow), (True, 6, 3)],
    ids=["absorbed", "plain", "whole"],
)
def test_a_mesh_changes_nothing(own_keys: bool, windows: int, heads: int):
    """Eight devices in all three axes against one; six windows and three heads do not divide: each device has all."""
    case = Case(windows=windows, keys=4, heads=heads, own_keys=own_keys, shared=not own_keys)
    alone = computed(case, "pallas_tpu")
    with jax.set_mesh(make_mesh(2, 2, 2)):
        together = computed(case, "pallas_tpu")
    for name in ("out", "query", "key"):
        np.testing.assert_allclose(getattr(together, name), getattr(alone, name), rtol=1e-6, atol=1e-6)


def test_a_mesh_runs_the_kernel_on_pieces(monkeypatch):
    seen = []

    def forward(query, key, value, valid, scale, *, interpret):
        seen.append((query.shape, key.shape, valid.shape, value is key))
        return query

    kernel = SimpleNamespace(forward=forward, unsupported=lambda *arrays: None)
    monkeypatch.setattr(api, "load_kernel", lambda name: kernel)
    query, key, valid = jnp.zeros((8, 2, 128)), jnp.zeros((8, 4, 1, 128)), jnp.ones((8, 4), bool)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        out = window_attention(query, key, key, valid, backend="pallas_tpu", interpret=True)
        plain = jnp.repeat(key, 2, axis=2)
        window_attention(query, plain, plain, valid, backend="pallas_tpu", interpret=True)
    assert out.shape == query.shape
    assert seen == [((2, 1, 128), (2, 4, 1, 128), (2, 4), True)] * 2


def test_within_a_replica_the_kernel_is_chosen_for_and_runs_on_the_same_pieces(monkeypatch):
    """As an update runs it on several replicas: one axis of the mesh is taken already."""
    asked, seen = [], []

    def forward(query, key, value, valid, scale, *, interpret):
        seen.append((query.shape, key.shape))
        return query

    kernel = SimpleNamespace(forward=forward, unsupported=lambda query, key, value: asked.append(query.shape))
    monkeypatch.setattr(api, "load_kernel", lambda name: kernel)
    monkeypatch.setattr(api, "platform", lambda: "tpu")
    query, key, valid = jnp.ones((8, 2, 128)), jnp.zeros((8, 4, 1, 128)), jnp.ones((8, 4), bool)

    def attended(batch):
        query, key, valid = batch
        return jnp.sum(window_attention(query, key, key, valid))

    with jax.set_mesh(make_mesh(2, 2, 2)):
        total = jax.jit(sum_over_replicas(attended))((query, key, valid))
    assert total == query.size
    assert set(asked) == {(2, 1, 128)}
    assert set(seen) == {((2, 1, 128), (2, 4, 1, 128))}


def shapes(width: int = 3072, heads: int = 24, own_keys: bool = False, dtype=jnp.bfloat16) -> tuple:
    query = jax.ShapeDtypeStruct((20480, heads, width), dtype)
    key = jax.ShapeDtypeStruct((20480, 9, heads if own_keys else 1, width), dtype)
    return query, key, key


def compiled_for(platform: str):
    kind = {"tpu": "TPU v5 lite", "gpu": "NVIDIA H200", "cpu": "cpu"}[platform]
    device = AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


@pytest.mark.parametrize(
    ("platform", "arrays", "expected"),
    [
        ("cpu", shapes(), "reference"),
        ("gpu", shapes(), "reference"),
        ("tpu", shapes(), "pallas_tpu"),
        ("tpu", shapes(128, own_keys=True), "pallas_tpu"),
        ("tpu", shapes(64, own_keys=True), "reference"),  # heads narrower than a TPU's register
        ("tpu", shapes(dtype=jnp.float16), "reference"),
        ("tpu", shapes(128 * 1024), "reference"),  # too wide for VMEM
    ],
)
def test_auto(platform: str, arrays: tuple, expected: str):
    with compiled_for(platform):
        assert api.choose(*arrays) == api.choose(*arrays, "auto") == expected
        assert api.choose(*arrays, "reference") == "reference"


@pytest.mark.parametrize(
    ("platform", "backend", "arrays", "message"),
    [
        (
            "cpu",
            "cuda",
            shapes(),
            r"backend 'cuda': expected one of \['auto', 'reference', 'pallas_tpu', 'pallas_gpu'\]",
        ),
        (
            "cpu",
            "pallas_tpu",
            shapes(),
            r"'pallas_tpu' runs on platform 'tpu', this program is for 'cpu'; use .*'auto'",
        ),
        (
            "tpu",
            "pallas_gpu",
            shapes(),
            r"'pallas_gpu' runs on platform 'gpu', this program is for 'tpu'; use .*'auto'",
        ),
        (
            "tpu",
            "pallas_tpu",
            shapes(100),
            r"cannot take query bfloat16\[20480, 24, 100\], .*: query width 100 is not a multiple of 128; use 'auto'",
        ),
    ],
)
def test_a_backend_that_cannot_run(platform: str, backend: str, arrays: tuple, message: str):
    with compiled_for(platform), pytest.raises(ConfigError, match=message):
        api.choose(*arrays, backend)


def test_shapes_that_do_not_fit():
    """The check is called by itself, because the annotations are checked first while the tests run."""
    query, key, valid = jnp.zeros((2, 4, 8)), jnp.zeros((2, 9, 3, 8)), jnp.ones((2, 9), bool)
    with pytest.raises(ValueError, match=r"shapes \(2, 4, 8\), \(2, 9, 3, 8\), .* K = H or 1"):
        api.check_shapes(query, key, key, None)
    key = jnp.zeros((2, 9, 4, 8))
    with pytest.raises(ValueError, match=r"\(2, 9, 4, 8\), \(2, 8\); expected .* valid \(W, S\)"):
        api.check_shapes(query, key, key, valid[:, 1:])


def test_the_local_interaction_uses_its_backend(monkeypatch):
    features = jax.random.normal(jax.random.key(0), (1, 2, 9, 4, 3 * 128))
    query = jax.random.normal(jax.random.key(1), (1, 2 * 9, 3 * 128))

    def run(kernel: str) -> jax.Array:
        attention = LocalAttention(
            *(3 * 128, 3 * 128, 3), absorbed=True, kernel=kernel, out_init=None, dtype=jnp.float32, rngs=nnx.Rngs(0)
        )
        return attention(query, features, None)

    plain = run("reference")
    with pytest.raises(ConfigError, match=r"refusion.kernel = 'pallas_tpu': .* this program is for 'cpu'; use 'auto'"):
        run("pallas_tpu")
    backends = []

    def interpreted(*arrays, backend, **options):
        backends.append(backend)
        return window_attention(*arrays, backend=backend, interpret=True, **options)

    monkeypatch.setattr(interactions, "window_attention", interpreted)
    found = run("pallas_tpu")
    # Both differ from float64 by the rounding of sums of 384 products.
    np.testing.assert_allclose(found, plain, rtol=0, atol=384**0.5 * np.finfo(np.float32).eps * np.abs(plain).max())
    assert backends == ["pallas_tpu"]
