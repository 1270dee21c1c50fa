"""AdamW, clipping and schedule against torch and transformers."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from tests.training.tiny import tiny_run
from vr_jax.errors import ConfigError
from vr_jax.settings import OptimizerSettings
from vr_jax.training.optimizer import check_groups, decays, make_optimizer, make_schedule, moments

SHAPES = {
    "projector.fc1.kernel": (4, 3),
    "projector.fc1.bias": (3,),
    "decoder.stages.0.input_norm.scale": (2, 3),
    "encoder.patch_embed.kernel": (3, 5),
}
STEPS = 25


def newton_schulz(matrix):
    """Five steps of the quintic iteration of Muon in float64 (Jordan 2024), from the matrix divided by its norm."""
    wide = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if wide else matrix) / np.linalg.norm(matrix)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if wide else x


def test_muon_orthogonalises_each_matrix_and_leaves_the_rest_to_adam():
    """Against the formulas in float64: Nesterov momentum with bias correction, and the size of Adam's updates."""
    shapes = {"decoder.stages.0.mlp.up.kernel": (2, 6, 9), "refusion.0.bias": (3,), "decoder.embed.weight": (5, 4)}
    shapes |= {"projector.peg.kernel": (3, 3, 1, 4), "decoder.lm_head.kernel": (4, 5)}
    config = OptimizerSettings(name="muon", lr=1e-2, clip_norm=1e9, warmup_ratio=0.0, schedule="constant")
    adamw = OptimizerSettings(lr=1e-2, clip_norm=1e9, warmup_ratio=0.0, schedule="constant")
    rng = np.random.default_rng(0)
    params = {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in shapes.items()}
    optimizers = [make_optimizer(one, make_schedule(one, STEPS), shapes) for one in (config, adamw)]
    states = [one.init(params) for one in optimizers]
    momentum = np.zeros(shapes["decoder.stages.0.mlp.up.kernel"])
    for step in range(1, 6):
        grads = {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in shapes.items()}
        muon, adam = (one.update(grads, state, params) for one, state in zip(optimizers, states, strict=True))
        (updates, states[0]), (others, states[1]) = muon, adam
        grad = np.asarray(grads["decoder.stages.0.mlp.up.kernel"], np.float64)
        momentum = 0.95 * momentum + 0.05 * grad
        nesterov = 0.95 * momentum / (1 - 0.95 ** (step + 1)) + 0.05 * grad / (1 - 0.95**step)
        for layer in range(2):
            expected = -1e-2 * 0.2 * 3 * newton_schulz(nesterov[layer])  # 3 = sqrt(9)
            np.testing.assert_allclose(updates["decoder.stages.0.mlp.up.kernel"][layer], expected, atol=2e-7)
        for path in shapes:
            if path != "decoder.stages.0.mlp.up.kernel":
                np.testing.assert_array_equal(updates[path], others[path])


def test_trajectory_equals_torch_adamw_with_clipping_groups_and_cosine():
    config = OptimizerSettings(
        lr=3e-2, weight_decay=0.1, clip_norm=1.0, warmup_ratio=0.1, lr_groups=(("encoder.*", 2e-3),)
    )
    rng = np.random.default_rng(0)
    start = {k: rng.normal(size=s).astype(np.float32) for k, s in SHAPES.items()}
    scales = rng.choice([0.05, 3.0], STEPS)  # norms on both sides of the clip
    grads = [{k: (rng.normal(size=s) * c).astype(np.float32) for k, s in SHAPES.items()} for c in scales]

    weights = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in start.items()}
    reference = torch.optim.AdamW(
        [
            {
                "params": [w],
                "weight_decay": 0.1 if decays(k) else 0.0,
                "lr": 2e-3 if k.startswith("encoder.") else 3e-2,
            }
            for k, w in weights.items()
        ],
        betas=(0.9, 0.999),
        eps=1e-8,
    )
    scheduler = get_cosine_schedule_with_warmup(reference, 3, STEPS)

    schedule = make_schedule(config, STEPS)
    optimizer = make_optimizer(config, schedule, SHAPES)
    params = jax.tree.map(jnp.asarray, start)
    state = optimizer.init(params)
    for step, grad in enumerate(grads):
        np.testing.assert_allclose(schedule(step), scheduler.get_last_lr()[0], rtol=1e-5, atol=1e-9)
        for k, w in weights.items():
            w.grad = torch.tensor(grad[k])
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        reference.step()
        scheduler.step()
        updates, state = optimizer.update(grad, state, params)
        params = optax.apply_updates(params, updates)
    for k, w in weights.items():
        np.testing.assert_allclose(params[k], w.detach().numpy(), rtol=2e-5, atol=2e-6, err_msg=k)
        assert np.abs(params[k] - start[k]).max() > 1e-3


def test_weight_decays_of_groups_equal_those_of_torch():
    config = OptimizerSettings(
        lr=3e-2,
        weight_decay=0.1,
        weight_decay_groups=(("encoder.*", 0.5), ("projector.*", 0.0)),
        clip_norm=1e9,
        warmup_ratio=0.0,
        schedule="constant",
    )
    rng = np.random.default_rng(0)
    shapes = SHAPES | {"decoder.embed.weight": (4, 3)}
    start = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    decay = {"encoder.patch_embed.kernel": 0.5, "decoder.embed.weight": 0.1}  # all others have none
    weights = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in start.items()}
    reference = torch.optim.AdamW(
        [{"params": [w], "weight_decay": decay.get(k, 0.0)} for k, w in weights.items()], lr=3e-2
    )
    optimizer = make_optimizer(config, make_schedule(config, STEPS), shapes)
    params = jax.tree.map(jnp.asarray, start)
    state = optimizer.init(params)
    for _ in range(5):
        grad = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
        for k, w in weights.items():
            w.grad = torch.tensor(grad[k])
        reference.step()
        updates, state = optimizer.update(grad, state, params)
        params = optax.apply_updates(params, updates)
    for k, w in weights.items():
        np.testing.assert_allclose(params[k], w.detach().numpy(), rtol=2e-5, atol=2e-6, err_msg=k)


def test_first_moments_in_bfloat16_equal_those_of_numpy():
    """The moment is rounded once when it is kept. Each update may see two roundings of it, of at most 2 ** -8 each."""
    config = OptimizerSettings(
        lr=1e-2, clip_norm=1e9, warmup_ratio=0.0, schedule="constant", first_moment_dtype="bfloat16"
    )
    rng = np.random.default_rng(0)
    params = {"projector.fc1.kernel": jnp.asarray(rng.normal(size=(6, 5)), jnp.float32)}
    optimizer = make_optimizer(config, make_schedule(config, STEPS), params)
    state = optimizer.init(params)
    first, second = moments(state)
    assert [leaf.dtype for leaf in first] == [jnp.bfloat16]
    assert [leaf.dtype for leaf in second] == [jnp.float32]
    mu, exact, nu = (np.zeros((6, 5)) for _ in range(3))
    for step in range(1, 6):
        grad = rng.normal(size=(6, 5)).astype(np.float32)
        updates, state = optimizer.update({"projector.fc1.kernel": grad}, state, params)
        whole = 0.9 * mu + 0.1 * grad  # the moment in full precision, from the one that was kept
        mu = whole.astype(ml_dtypes.bfloat16).astype(np.float64)
        exact = 0.9 * exact + 0.1 * grad
        nu = 0.999 * nu + 0.001 * np.square(grad, dtype=np.float64)
        root = np.sqrt(nu / (1 - 0.999**step)) + 1e-8
        bound = 2.0**-7 * np.abs(exact).max() / (1 - 0.9**step) / root
        found = np.asarray(updates["projector.fc1.kernel"]) / -1e-2
        assert np.all(np.abs(found - whole / (1 - 0.9**step) / root) <= bound)
    assert np.abs(found - exact / (1 - 0.9**5) / root).max() > 1e-4  # float32 would be equal


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_type_of_first_moments_is_that_of_all_of_them(name):
    config = OptimizerSettings(name=name, first_moment_dtype="bfloat16")
    params = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in SHAPES.items()}
    optimizer = make_optimizer(config, make_schedule(config, STEPS), SHAPES)
    first, second = moments(jax.eval_shape(optimizer.init, params))
    assert sorted(leaf.shape for leaf in first) == sorted(SHAPES.values())
    assert {leaf.dtype for leaf in first} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in second} == {jnp.dtype("float32")}


def test_no_decay_on_biases_and_norms():
    assert {path: decays(path) for path in SHAPES} == {
        "projector.fc1.kernel": True,
        "projector.fc1.bias": False,
        "decoder.stages.0.input_norm.scale": False,
        "encoder.patch_embed.kernel": True,
    }


@pytest.mark.parametrize("total", [2, 7, 1000])
def test_cosine_starts_at_zero_peaks_after_the_warm_up_and_ends_at_zero(total):
    schedule = make_schedule(OptimizerSettings(lr=0.5), total)
    warmup = -(-total * 3 // 100)
    values = [float(schedule(i)) for i in range(total + 1)]
    assert values[0] == 0
    assert values[warmup] == pytest.approx(0.5)
    assert total == warmup or values[total] == pytest.approx(0, abs=1e-7)


def test_without_warm_up_and_constant():
    schedule = make_schedule(OptimizerSettings(lr=0.5, warmup_ratio=0.0, schedule="constant"), 10)
    assert [float(schedule(i)) for i in (0, 5, 9)] == [0.5] * 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lr": 0.0}, "OptimizerSettings.lr = 0.0"),
        ({"lr": float("nan")}, "OptimizerSettings.lr = nan"),
        ({"lr": 1.0, "warmup_ratio": 1.5}, "OptimizerSettings.warmup_ratio = 1.5"),
        ({"lr": 1.0, "schedule": "linear"}, "OptimizerSettings.schedule = 'linear'"),
        ({"lr": 1.0, "weight_decay": -1}, "OptimizerSettings.weight_decay = -1"),
    ],
)
def test_impossible_settings_are_named(fields, message):
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        OptimizerSettings(**fields)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ((("encodr.*", 1e-5),), r"'encodr\.\*' matches no parameter; did you mean encoder\.\*.*\? there are "),
        ((("*.kernle", 1e-5),), r"'\*\.kernle' matches no parameter; did you mean \*\.kernel"),
        ((("encoder.*", 1e-5),), r"'encoder\.\*' matches frozen parameters only; add what it should match to"),
        ((("*", 1e-5), ("projector.*", 1e-6)), r"'projector\.\*' has no effect, because globs before it match all"),
        ((("*", 0.0),), "gives every trained parameter the learning rate 0: nothing would be trained"),
    ],
)
def test_a_group_without_effect_is_refused(groups, message):
    trained = [path for path in SHAPES if not path.startswith("encoder.")]
    frozen = [path for path in SHAPES if path.startswith("encoder.")]
    with pytest.raises(ConfigError, match=rf"^config\.optimizer\.lr_groups.*{message}"):
        check_groups(OptimizerSettings(lr_groups=groups), trained, frozen)
    if groups[-1][1]:  # A weight decay of 0 for all is no mistake.
        with pytest.raises(ConfigError, match=rf"^config\.optimizer\.weight_decay_groups.*{message}"):
            check_groups(OptimizerSettings(weight_decay_groups=groups), trained, frozen)
    check_groups(OptimizerSettings(lr_groups=(("projector.*", 0.0), ("*", 1e-5))), trained, frozen)


@pytest.mark.parametrize("glob", ["*.bias", "*.scale", "*_norm.*"])
def test_a_weight_decay_of_what_is_never_decayed_is_refused(glob):
    with pytest.raises(ConfigError, match=r"weight_decay_groups: '.*' has no effect, because it matches biases"):
        check_groups(OptimizerSettings(weight_decay_groups=((glob, 0.1),)), list(SHAPES), [])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "optimizer.b2=0.95",
            r"optimizer\.b2 = 0\.95 has no effect with config\.optimizer\.name = 'adafactor'",
        ),
        ("optimizer.first_moment_dtype=bfloat16", r"first_moment_dtype = 'bfloat16' has no effect with .*'adafactor'"),
        ("optimizer.decay_rate=0.7", r"decay_rate = 0\.7 has no effect with config\.optimizer\.name = 'adamw'"),
        ("optimizer.clipping_threshold=2", r"clipping_threshold = 2\.0 has no effect with .*name = 'adamw'"),
    ],
)
def test_numbers_that_an_optimizer_lacks_are_refused(override, message):
    name = "adafactor" if "adafactor" in message else "adamw"
    with pytest.raises(ConfigError, match=message):
        tiny_run().override([f"optimizer.name={name}", override])
    other = "adamw" if name == "adafactor" else "adafactor"
    tiny_run().override([f"optimizer.name={other}", override])


@pytest.mark.parametrize(("ratio", "total", "steps"), [(0.03, 1000, 30), (0.03, 2, 1), (0.9, 1, 0), (0.0, 7, 0)])
def test_the_warm_up_ends_before_the_run_and_a_single_update_has_none(ratio, total, steps):
    assert OptimizerSettings(warmup_ratio=ratio).warmup_steps(total) == steps


def test_a_run_that_is_all_warm_up_is_refused():
    with pytest.raises(ConfigError, match=r"warmup_ratio = 0\.9 makes all 5 updates a warm-up, which never reaches"):
        make_schedule(OptimizerSettings(warmup_ratio=0.9), 5)


def test_a_group_that_matches_nothing_is_named():
    config = OptimizerSettings(lr=1.0, lr_groups=(("visoin.*", 1e-6),))
    with pytest.raises(ConfigError, match=r"'visoin\.\*' matches no parameter"):
        make_optimizer(config, make_schedule(config, 10), SHAPES)
