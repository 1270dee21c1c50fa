"""Every attention backend against one float64 loop: grouped queries, segments, padding, guide keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import vr_jax.kernels.attention.api as attention_module
import vr_jax.kernels.attention.blocked as attention_cpu
from tests.tiny import tiny_config
from vr_jax.kernels.attention.api import attention, cached_attention
from vr_jax.model.vlm import VisionLanguageModel
from vr_jax.sharding import make_mesh

BACKENDS = [
    "xla",
    pytest.param("cudnn", marks=pytest.mark.skip(reason="cuDNN attention needs an NVIDIA GPU; tests run on the CPU")),
    "splash",  # Pallas interpreter
    "blocked",
]
B, N, H, G, K = 2, 137, 4, 2, 8


def reference(query, key, value, query_segments, key_segments, causal):
    out = np.zeros(query.shape)
    repeat = query.shape[2] // key.shape[2]
    for b, i, h in np.ndindex(query.shape[:3]):
        seen = key_segments[b] == query_segments[b, i]
        if causal:
            seen &= np.arange(len(seen)) <= i
        logits = key[b, seen, h // repeat] @ query[b, i, h] / np.sqrt(query.shape[-1])
        weights = np.exp(logits - logits.max())
        out[b, i, h] = weights / weights.sum() @ value[b, seen, h // repeat]
    return out


def inputs(text_tokens: int):
    """Rows of two and three segments and padding; `text_tokens` more keys, of which the last matches nothing."""
    rng = np.random.default_rng(0)
    segments = np.array([[1] * 9 + [2] * 120 + [0] * 8, [1] * 5 + [2] * 25 + [3] * 107])
    keys = np.concatenate([segments, np.tile([1, 2, -1][:text_tokens], (B, 1)).astype(int)], axis=1)
    shape = (B, keys.shape[1], G, K)
    query, key, value = (rng.normal(size=s) for s in ((B, N, H, K), shape, shape))
    return query, key, value, segments, keys


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("causal", "text_tokens"), [(True, 0), (False, 0), (False, 3)])
def test_matches_the_loop(backend: str, causal: bool, text_tokens: int, monkeypatch):
    monkeypatch.setattr(attention_module, "SPLASH_BLOCK", 128)  # so that a row takes two blocks
    monkeypatch.setattr(attention_cpu, "KEY_BLOCK", 32)  # so that some blocks meet and others do not
    monkeypatch.setattr(attention_cpu, "QUERY_ROWS", 40)
    query, key, value, segments, keys = inputs(text_tokens)
    expected = reference(query, key, value, segments, keys, causal)
    weight = np.random.default_rng(1).normal(size=expected.shape) * (segments > 0)[..., None, None]

    def attend(query, key, value, backend=backend):
        return attention(query, key, value, query_segments=segments, key_segments=keys, causal=causal, backend=backend)

    arrays = tuple(jnp.asarray(x, jnp.float32) for x in (query, key, value))
    found = jax.jit(attend)(*arrays)
    real = segments > 0
    np.testing.assert_allclose(found[real], expected[real], atol=2e-6)
    assert np.isfinite(np.asarray(found)).all()

    def gradient(backend):
        loss = lambda *x: jnp.sum(attend(*x, backend=backend) * weight)  # noqa: E731
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arrays)

    if backend != "xla":
        for ours, theirs in zip(gradient(backend), gradient("xla"), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(N, N), (N, N + 1), (N + 1, N), (N + 1, N + 1)])
def test_odd_lengths_reach_cudnn_even(monkeypatch, lengths, causal):
    """What cuDNN is given, computed by XLA: even lengths, and the same values and gradients as without padding."""
    rng = np.random.default_rng(0)
    n, m = lengths
    query, key, value, weight = (
        jnp.asarray(rng.normal(size=(B, length, H, K)), jnp.float32) for length in (n, m, m, n)
    )
    segments, keys = (jnp.asarray(rng.integers(1, 3, (B, length))) for length in lengths)
    segments = segments.at[:, 0].set(keys[:, 0])
    library, seen = jax.nn.dot_product_attention, []

    def by_xla(query, key, value, *, implementation, **options):
        if implementation == "cudnn":
            seen.append((query.shape[1] % 2, key.shape[1] % 2))
        return library(query, key, value, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    real = (segments[:, :, None] == keys[:, None]) & ((not causal) | (np.arange(n)[:, None] >= np.arange(m)))
    weight = weight * jnp.any(real, axis=-1)[..., None, None]  # a query that sees no key is unspecified

    def loss(backend):
        def weighted(*arrays):
            found = attention(*arrays, query_segments=segments, key_segments=keys, causal=causal, backend=backend)
            return jnp.sum(found * weight)

        return jax.value_and_grad(weighted, argnums=(0, 1, 2))(query, key, value)

    for ours, plain in zip(jax.tree.leaves(loss("cudnn")), jax.tree.leaves(loss("xla")), strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-5)
    assert seen == [(0, 0)]


@pytest.mark.parametrize(("mesh", "groups"), [((2, 2, 2), 2), ((1, 2, 4), 2)])  # 2 key heads on 4 devices: repeated
def test_splash_on_a_mesh(mesh: tuple[int, int, int], groups: int):
    """Pallas calls are not partitioned automatically; rows are cut over (replica, fsdp) and heads over tensor."""
    rng = np.random.default_rng(0)
    rows = 8
    query, key, value = (
        jnp.asarray(rng.normal(size=(rows, N, heads, K)), jnp.float32) for heads in (H, groups, groups)
    )
    segments = jnp.asarray(rng.integers(0, 3, (rows, N)))

    def attend(query, key, value, backend):
        return attention(
            query, key, value, query_segments=segments, key_segments=segments, causal=False, backend=backend
        )

    expected = attend(query, key, value, "xla")
    with jax.set_mesh(make_mesh(*mesh)):
        found = jax.jit(attend, static_argnames="backend")(query, key, value, backend="splash")
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_a_new_token_sees_the_valid_slots_of_its_cache():
    query, key, value, segments, _ = inputs(0)
    valid = segments == 2
    arrays = (query[:, :1], key.swapaxes(1, 2), value.swapaxes(1, 2))  # in a cache, heads come before slots
    found = cached_attention(*(jnp.asarray(x, jnp.float32) for x in arrays), jnp.asarray(valid))
    expected = reference(query[:, :1], key, value, np.full((B, 1), 2), segments, causal=False)
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_unknown_backend():
    query, key, value, segments, keys = inputs(0)
    with pytest.raises(ValueError, match="'flash': expected 'auto', 'xla', 'cudnn', 'splash' or 'blocked'"):
        attention(query, key, value, query_segments=segments, key_segments=keys, causal=True, backend="flash")


@pytest.mark.parametrize(
    ("platform", "dtype", "lengths", "width", "chosen"),
    [
        ("tpu", jnp.float32, (137, 140), 64, "splash"),
        ("gpu", jnp.bfloat16, (136, 140), 64, "cudnn"),
        ("gpu", jnp.bfloat16, (137, 140), 64, "cudnn"),
        ("gpu", jnp.bfloat16, (136, 140), 100, "xla"),
        ("gpu", jnp.float32, (136, 140), 64, "xla"),
        ("cpu", jnp.bfloat16, (136, 140), 64, "xla"),
    ],
)
def test_auto_suits_the_platform_it_is_compiled_for(platform, dtype, lengths, width, chosen):
    device = jax.sharding.AbstractDevice(device_kind="any", num_cores=None, platform=platform)
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    query, key = (jax.ShapeDtypeStruct((1, length, 2, width), dtype) for length in lengths)
    with jax.sharding.use_abstract_mesh(mesh):
        assert attention_module._choose("auto", query, key) == chosen


def test_a_backend_by_name_is_the_encoders_too():
    model = nnx.eval_shape(lambda: VisionLanguageModel(tiny_config(attention="xla"), rngs=nnx.Rngs(0)))
    assert {stage.attn.backend for stage in model.encoder.stages} == {model.decoder.attention_backend} == {"xla"}
