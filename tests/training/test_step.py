"""The update on every mesh, in micro-batches, and of the trainable subset only."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.model.families import FAMILIES, family_batch
from tests.tiny import quick, randomized
from tests.training.tiny import PLAIN, noise_batch, tiny_config
from vr_jax import sharding
from vr_jax.model.vlm import abstract_model
from vr_jax.model_directory import warm_start
from vr_jax.settings import OptimizerSettings
from vr_jax.training.optimizer import make_optimizer, make_schedule
from vr_jax.training.state import (
    ConfigError,
    ModelTree,
    TrainState,
    abstract_state,
    create_state,
    shardings_of,
)
from vr_jax.training.step import batch_counts, make_train_step, split_micro_batches

PHASE2 = ("decoder.*", "refusion.*", "projector.*", "image_newline")
PHASE1 = ("refusion.*", "projector.*")
# Models, and what each trains in phase 2 and in phase 1.
MODELS = {
    "plain": (PLAIN, ("decoder.*", "projector.*"), ("projector.*",)),
    "vision_remember": (tiny_config(), PHASE2, PHASE1),
}
STEPS = 5


@dataclasses.dataclass
class Run:
    """A short run: the numbers of each step, the first and the last state."""

    series: list[dict[str, float]]
    start: TrainState
    state: TrainState


def run(
    mesh_shape,
    *,
    model=None,
    globs=PHASE2,
    accumulation=1,
    start=None,
    batches=STEPS,
    frozen_dtype="float32",
    sources=(),
):
    tree = ModelTree(model or tiny_config())
    mesh = sharding.make_mesh(*mesh_shape, devices=jax.devices()[: int(np.prod(mesh_shape))])
    settings = OptimizerSettings(lr=3e-3, warmup_ratio=0.2)
    schedule = make_schedule(settings, 10)
    trainable = tree.trainable(globs)
    optimizer = make_optimizer(settings, schedule, trainable)
    abstract = abstract_state(tree, optimizer, trainable, mesh, frozen_dtype)
    step = make_train_step(
        tree, optimizer, schedule, abstract, accumulation=accumulation, loss_chunk=8, sources=sources
    )
    batches = [noise_batch(i) for i in range(batches)] if isinstance(batches, int) else batches
    with jax.set_mesh(mesh):
        if start is None:
            model, _ = warm_start([], tree.config, mesh)
            start = jax.tree.map(np.asarray, create_state(tree, optimizer, abstract, model))
        state = jax.device_put(start, shardings_of(abstract))
        series = []
        for batch in batches:
            state, metrics = step(state, jax.device_put(batch, sharding.batch_sharding(mesh)))
            series.append({name: float(value) for name, value in metrics.items()})
    return Run(series, start, state)


def column(run, name):
    return [numbers[name] for numbers in run.series]


@pytest.fixture(scope="module")
def single():
    return run((1, 1, 1))


@pytest.mark.parametrize(
    "mesh_shape",
    quick([(1, 8, 1), (1, 4, 2), (2, 4, 1), (8, 1, 1), (2, 2, 2)], (2, 2, 2)),
    ids=["fsdp8", "fsdp4_tensor2", "replica2_fsdp4", "replica8", "all_axes"],
)
def test_losses_on_eight_devices_equal_those_on_one(single, mesh_shape):
    """On the mesh of all axes each device also computes its rows in two micro-batches."""
    accumulation = 2 if mesh_shape == (2, 2, 2) else 1
    sharded = run(mesh_shape, start=single.start, accumulation=accumulation)
    for name in ("loss", "grad_norm", "tokens", "targets", "samples", "tiles", "pairs"):
        np.testing.assert_allclose(column(sharded, name), column(single, name), rtol=1e-5, err_msg=name)
    state = sharded.state
    kernel = state.params["decoder.stages.1.mlp.up.kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (1, 32 // mesh_shape[1], 64 // mesh_shape[2])
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == kernel.shape]
    assert len(moments) >= 2
    assert all(m.sharding.shard_shape(m.shape) == kernel.sharding.shard_shape(kernel.shape) for m in moments[:2])
    assert len(set(column(sharded, "loss"))) == STEPS


@pytest.mark.slow  # Initial values are compiled for a second mesh.
def test_initial_parameters_do_not_depend_on_the_mesh(single):
    start = run((1, 4, 2), batches=0).start
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), start, single.start)


@pytest.mark.slow  # The comparison of eight devices with one accumulates too.
@pytest.mark.parametrize("name", MODELS)
def test_accumulation_is_the_exact_global_token_mean(name):
    model, globs, _ = MODELS[name]
    single = run((1, 1, 1), model=model, globs=globs)
    pieces = run((1, 2, 1), model=model, globs=globs, accumulation=4, start=single.start)
    for metric in ("loss", "grad_norm", "tokens", "targets", "samples", "tiles", "pairs"):
        np.testing.assert_allclose(column(pieces, metric), column(single, metric), rtol=1e-5, err_msg=metric)
    path = "projector.fc1.kernel"
    np.testing.assert_allclose(pieces.state.params[path], single.state.params[path], atol=2e-5)


def test_one_step_equals_plain_full_logits_training(single):
    """The same update written the textbook way: all logits, one device, optax.adamw on all of `params`."""
    tree, start = ModelTree(tiny_config()), single.start
    batch = jax.tree.map(jnp.asarray, noise_batch(0))

    def loss(params):
        model = tree.build({**start.frozen, **params})
        logits = model.logits(model(batch)[0])[:, :-1]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.tokens[:, 1:])
        mask = batch.loss_mask[:, 1:]
        return jnp.sum(losses * mask) / jnp.sum(mask)

    value, grads = jax.jit(jax.value_and_grad(loss))(start.params)
    assert single.series[0]["loss"] == pytest.approx(float(value), rel=1e-6)
    assert single.series[0]["grad_norm"] == pytest.approx(float(optax.global_norm(grads)), rel=1e-5)


def with_sources(batch, count):
    """The batch with samples of several sources in its rows, and none of the last source."""
    rows = np.arange(len(batch.tokens))[:, None]
    source = np.where(batch.segment_ids > 0, (batch.segment_ids + rows // 2) % (count - 1), 0)
    return batch.replace(token_source=source.astype(np.int32))


@pytest.mark.parametrize("mesh_shape", quick([(1, 1, 1), (2, 2, 2)], (1, 1, 1)))
def test_the_numbers_of_each_source_are_those_of_its_tokens(mesh_shape):
    """On one device, and on eight in two micro-batches, against a loop over the samples."""
    names = ("a", "b", "c", "none")
    batch = with_sources(noise_batch(0), len(names))
    options = {"model": PLAIN, "globs": ("decoder.*", "projector.*"), "batches": [batch], "sources": names}
    found = run(mesh_shape, accumulation=1 + (mesh_shape != (1, 1, 1)), **options)
    tree = ModelTree(PLAIN)
    model = tree.build({**found.start.frozen, **found.start.params})
    logits = np.asarray(jax.jit(lambda batch: model.logits(model(batch)[0]))(jax.tree.map(jnp.asarray, batch)))
    losses, samples = {name: [] for name in names}, dict.fromkeys(names, 0)
    for row, segments in enumerate(batch.segment_ids):
        for segment in range(1, segments.max() + 1):
            (places,) = np.nonzero(segments == segment)
            name = names[batch.token_source[row, places[0]]]
            samples[name] += 1
            for place in places[1:]:
                if batch.loss_mask[row, place]:
                    before = logits[row, place - 1].astype(np.float64)
                    losses[name].append(np.log(np.exp(before).sum()) - before[batch.tokens[row, place]])
    (numbers,) = found.series
    for name in names:
        assert numbers[f"samples/{name}"] == samples[name]
        assert numbers[f"targets/{name}"] == len(losses[name])
        expected = np.mean(losses[name]) if losses[name] else 0.0
        assert numbers[f"loss/{name}"] == pytest.approx(expected, rel=1e-5)
    assert samples["none"] == 0 < min(samples[name] for name in "abc")
    total = sum(numbers[f"loss/{name}"] * numbers[f"targets/{name}"] for name in names)
    assert total / numbers["targets"] == pytest.approx(numbers["loss"], rel=1e-6)


@pytest.mark.parametrize("name", quick(MODELS, "plain"))
def test_only_the_trainable_subset_moves_has_moments_and_gradients(name):
    model, _, globs = MODELS[name]
    phase1 = run((1, 2, 1), model=model, globs=globs, frozen_dtype="bfloat16", batches=2)
    state, start = phase1.state, phase1.start
    assert all(p.startswith(("projector.", "refusion.")) for p in state.params)
    assert {x.dtype for x in state.frozen.values()} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in state.params.values()} == {jnp.dtype(jnp.float32)}
    jax.tree.map(np.testing.assert_array_equal, state.frozen, start.frozen)
    moved = [p for p in state.params if np.any(state.params[p] != start.params[p])]
    # With absorbed keys the key bias cancels in the softmax: it has no gradient.
    assert set(state.params) - set(moved) <= {"refusion.blocks.0.cross_attn.k.bias"}
    trained = sum(x.size for x in state.params.values())
    held = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
    assert held == 2 * trained


def test_metrics_count_work_without_padding():
    batch = noise_batch(3)
    counts = {k: int(v) for k, v in batch_counts(jax.tree.map(jnp.asarray, batch)).items()}
    lengths = [int((row == s).sum()) for row in batch.segment_ids for s in (1, 2)]
    assert counts == {
        "samples": 16,
        "tokens": sum(lengths),
        "targets": int(batch.loss_mask.sum()),
        "tiles": 16,
        "pairs": sum(n * (n + 1) // 2 for n in lengths),
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_pairs_are_counted_whatever_the_positions_are(name: str):
    """A row of several samples, padding, and positions of several axes, which stand still within an image."""
    batch = family_batch(name)
    ids = np.asarray(batch.segment_ids)
    lengths = [int(np.count_nonzero(row == number)) for row in ids for number in range(1, row.max() + 1)]
    assert int(batch_counts(batch)["pairs"]) == sum(n * (n + 1) // 2 for n in lengths)


def test_micro_batches_keep_rows_on_their_device():
    mesh = sharding.make_mesh(fsdp=4, devices=jax.devices()[:4])
    batch = jax.device_put(noise_batch(0), sharding.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        lowered = jax.jit(lambda b: split_micro_batches(b, 2)).lower(batch)
    text = lowered.compile().as_text()
    assert not any(word in text for word in ("all-to-all", "all-gather", "collective-permute", "all-reduce"))


def test_a_batch_without_targets_changes_nothing(single):
    empty = dataclasses.replace(noise_batch(0), loss_mask=np.zeros((8, 24), bool))
    one = run((1, 1, 1), start=single.start, batches=[empty] * 2)
    assert column(one, "loss") == column(one, "grad_norm") == [0.0, 0.0]
    assert column(one, "lr")[1] > 0
    jax.tree.map(np.testing.assert_array_equal, one.state.params, one.start.params)


def test_model_tree_is_the_model():
    config = PLAIN
    tree, model = ModelTree(config), randomized(abstract_model(config), seed=3)
    rebuilt = tree.build(tree.flatten(model))
    assert jax.tree.structure(rebuilt) == jax.tree.structure(model)
    assert all(a is b for a, b in zip(jax.tree.leaves(rebuilt), jax.tree.leaves(model), strict=True))


def test_trainable_globs_that_match_nothing_are_named():
    tree = ModelTree(tiny_config(refusion=None))
    with pytest.raises(ConfigError, match=r"'refusion\.\*' matches no parameter.*projector\.fc1"):
        tree.trainable(PHASE1)
