"""Which backend is chosen, and that every one can be asked for by name."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from tests.kernels.attention.cases import Case, without_masks
from tests.noise import assert_within_noise
from tests.tiny import tiny_config
from vr_jax.errors import ConfigError
from vr_jax.kernels.attention import api, attention, full_attention
from vr_jax.model.vlm import VisionLanguageModel


@pytest.mark.parametrize("backend", api.BACKENDS)
def test_a_backend_by_name_gets_the_arrays(monkeypatch, backend: str):
    arrays = Case().arrays()
    masks = dict(zip(("query_segments", "key_segments"), arrays["segments"], strict=True), causal=True)
    given = []

    def attend(*qkv, **options):
        given.append((qkv, options))
        return qkv[0]

    monkeypatch.setitem(api.IMPLEMENTATIONS, backend, attend)
    monkeypatch.setattr(api, "platform", lambda: "gpu" if backend == "cudnn" else "cpu")
    attention(*arrays["arrays"], **masks, backend=backend)
    assert given == [(arrays["arrays"], masks)]


@pytest.mark.parametrize("backend", ["auto", "splash", "blocked"])
def test_full_attention(backend: str):
    arrays, exact, plain = without_masks()
    assert_within_noise(jax.jit(full_attention, static_argnums=3)(*arrays, backend), exact, plain)


def test_an_unknown_backend_is_named():
    arrays = Case().arrays()
    query_segments, key_segments = arrays["segments"]
    message = "'flash': expected one of 'auto', 'xla', 'cudnn', 'splash', 'blocked'"
    with pytest.raises(ConfigError, match=message):
        attention(
            *arrays["arrays"], query_segments=query_segments, key_segments=key_segments, causal=True, backend="flash"
        )


def test_a_backend_of_another_platform_is_refused_or_told(monkeypatch, caplog):
    api._check_platform.cache_clear()  # noqa: SLF001  # the warning may have come in another test
    query = key = jax.ShapeDtypeStruct((1, 8, 2, 64), jnp.bfloat16)
    with pytest.raises(ConfigError, match="'cudnn' needs an NVIDIA GPU, and the platform is 'cpu'; 'auto' chooses"):
        api.choose(query, key, "cudnn")
    for _ in range(2):
        assert api.choose(query, key, "splash") == "splash"
    (warning,) = caplog.messages
    assert "on the platform 'cpu' Pallas' interpreter runs it" in warning
    monkeypatch.setattr(api, "platform", lambda: "tpu")
    assert api.choose(query, key, "splash") == "splash"
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(
    ("platform", "dtype", "lengths", "width", "chosen"),
    [
        ("tpu", jnp.float32, (137, 140), 64, "splash"),
        ("gpu", jnp.bfloat16, (136, 140), 64, "cudnn"),
        ("gpu", jnp.bfloat16, (137, 140), 64, "cudnn"),
        ("gpu", jnp.bfloat16, (136, 140), 100, "xla"),
        ("gpu", jnp.bfloat16, (136, 140), 136, "xla"),
        ("gpu", jnp.float32, (136, 140), 64, "xla"),
        ("cpu", jnp.bfloat16, (136, 140), 64, "xla"),
        ("cpu", jnp.float32, (512, 512), 64, "blocked"),
    ],
)
def test_auto_suits_the_platform_that_the_program_is_compiled_for(platform, dtype, lengths, width, chosen):
    device = jax.sharding.AbstractDevice(device_kind="any", num_cores=None, platform=platform)
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    query, key = (jax.ShapeDtypeStruct((1, length, 2, width), dtype) for length in lengths)
    with jax.sharding.use_abstract_mesh(mesh):
        assert api.choose(query, key) == chosen


def test_the_model_hands_its_backend_to_encoder_and_decoder():
    model = nnx.eval_shape(lambda: VisionLanguageModel(tiny_config(attention="xla"), rngs=nnx.Rngs(0)))
    assert {stage.attn.backend for stage in model.encoder.stages} == {model.decoder.attention_backend} == {"xla"}
