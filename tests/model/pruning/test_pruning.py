"""Pruners in a whole model: masked rows against shorter ones, cached decoding against recomputation, budgets."""

from __future__ import annotations

import dataclasses
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.tiny import SampleImage, Text, example, pack, quick, randomized, tiny_config, tiny_decoder, tiny_refusion
from vr_jax.errors import ConfigError
from vr_jax.model.batch import NEWLINE, NO_CELL, Batch
from vr_jax.model.config import VlmConfig, anyres9_all36
from vr_jax.model.decoders.stages import DecoderInputs, StageHook
from vr_jax.model.decoders.transformer import TransformerConfig
from vr_jax.model.parameters import flatten_params, merge_stages
from vr_jax.model.projectors.mlp import MlpConfig
from vr_jax.model.pruning.dropping import drop
from vr_jax.model.pruning.fastv import FastVConfig
from vr_jax.model.pruning.pyramid_drop import PyramidDropConfig
from vr_jax.model.pruning.vispruner import VisPrunerConfig
from vr_jax.model.registry import PrunerConfig
from vr_jax.model.spec import ModelSpec, PromptSize
from vr_jax.model.vlm import VisionLanguageModel, abstract_model
from vr_jax.training.state import ModelTree

PRUNINGS = {
    "fastv": FastVConfig(layer=2, keep=0.3),
    "pyramid_drop": PyramidDropConfig(layers=(1, 2, 3), ratios=(0.5, 0.25, 0.0)),
    "vispruner": VisPrunerConfig(tokens=16),
}
STEPS = 3


def config_with(pruning, **changes) -> VlmConfig:
    """36 vision tokens per tile."""
    return tiny_config(projector=MlpConfig(), refusion=None, pruning=pruning, **changes)


def prompt_sizes(batch: Batch) -> list[PromptSize]:
    return [
        PromptSize(
            text=int(np.sum((cell == NO_CELL) & (segments > 0))),
            cells=int(np.sum(cell >= 0)),
            newlines=int(np.sum(cell == NEWLINE)),
            tiles=int(np.sum(tiles > 0)),
        )
        for cell, segments, tiles in zip(batch.vision_cell, batch.segment_ids, batch.tile_segment, strict=True)
    ]


class Rows(NamedTuple):
    """Prompts of different lengths and numbers of tiles, aligned to the right, with more padding than they need."""

    batch: Batch
    other_order: Batch  # the second prompt, no prompt, the first


@pytest.fixture(scope="module")
def rows() -> Rows:
    config = config_with(None)
    prompts = [
        example(config, Text(3), SampleImage(), Text(6), seed=1),
        example(config, Text(5), SampleImage(tiles=3, crop=1), Text(4), seed=2),
        example(config, Text(9), seed=3),
    ]

    def packed(rows):
        return pack(config, rows, tokens=150, tiles=3, pad_side="left")

    return Rows(packed([[p] for p in prompts]), packed([[prompts[1]], [], [prompts[0]]]))


def model_with(pruning) -> VisionLanguageModel:
    """The same weights for every pruner: stages differ, layers do not."""
    config = config_with(pruning)
    base = randomized(abstract_model(config_with(None)))
    layers = {"encoder": base.encoder.stages, "decoder": base.decoder.stages}
    model = abstract_model(config)
    for name, bounds in {"encoder": config.encoder_bounds, "decoder": config.decoder_bounds}.items():
        whole = jax.tree.map(lambda *parts: jnp.concatenate(parts), *layers[name])
        stages = [jax.tree.map(lambda leaf, a=a, b=b: leaf[a:b], whole) for a, b in itertools.pairwise(bounds)]
        getattr(base, name).stages = nnx.List(stages)
        getattr(base, name).bounds = bounds
    base.config = model.config
    return base


class Found(NamedTuple):
    """Of one pruner: last logits of the prefill, those of every decoded token, what is left before each stage."""

    model: VisionLanguageModel
    lengths: tuple[int, ...]
    prefill: jax.Array
    decoded: jax.Array
    kept: list[np.ndarray]


ANSWERS = np.random.default_rng(5).integers(1, 40, (3, STEPS)).astype(np.int32)


@jax.jit
def masked(model: VisionLanguageModel, batch: Batch, answers):
    return _generate(model, batch, None, answers)


def _generate(model: VisionLanguageModel, batch: Batch, lengths, answers):
    levels = model.encode_images(batch)
    hook, kept = model.stage_hook(levels, batch, lengths), []

    def apply(k, inputs, state):
        inputs, state = hook.apply(k, inputs, state)
        if k < len(model.decoder.stages):
            kept.append(inputs)
        return inputs, state

    rows, length = batch.tokens.shape
    slots = length + STEPS if lengths is None else [n + STEPS for n in lengths]
    inputs = DecoderInputs(hidden=model.embed(batch, levels), positions=batch.positions, segment_ids=batch.segment_ids)
    hidden, cache = model.decoder(inputs, model.init_cache(rows, slots), StageHook(apply, hook.state))
    prefill, decoded = model.logits(hidden[:, -1]), []
    for i in range(STEPS):
        hidden, cache = model.decode(answers[:, i : i + 1], batch.positions[:, -1:] + 1 + i, cache)
        decoded.append(model.logits(hidden[:, 0]))
    return prefill, jnp.stack(decoded, axis=1), [inputs.segment_ids > 0 for inputs in kept]


@pytest.fixture(scope="module", params=quick(PRUNINGS, "vispruner"))
def found(request, rows) -> Found:
    model = model_with(PRUNINGS[request.param])
    sizes, pruning = prompt_sizes(rows.batch), model.config.pruning
    lengths = tuple(
        max(pruning.kept(model.config.spec, layer, size) for size in sizes)
        for layer in model.config.decoder_bounds[:-1]
    )
    return Found(model, lengths, *masked(model, rows.batch, ANSWERS))


@pytest.mark.slow  # Both forms are compiled; inference/test_generate_pruned.py compares their tokens.
def test_rows_cut_short_equal_masked_ones(found, rows):
    run = jax.jit(_generate, static_argnames="lengths")
    prefill, decoded, kept = run(found.model, rows.batch, found.lengths, ANSWERS)
    assert [used.shape[1] for used in kept] == list(found.lengths)
    assert found.lengths[-1] < rows.batch.tokens.shape[1] / 2
    np.testing.assert_allclose(prefill, found.prefill, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(decoded, found.decoded, atol=1e-5, rtol=1e-5)
    for short, whole in zip(kept, found.kept, strict=True):
        np.testing.assert_array_equal(short.sum(axis=1), whole.sum(axis=1))


def test_the_budget_is_met(found, rows):
    """Exactly, but for VisPruner, whose selected patches may have been cropped away."""
    config = found.model.config
    assert [used.shape for used in found.kept] == [rows.batch.tokens.shape] * len(found.lengths)
    for row, size in enumerate(prompt_sizes(rows.batch)):
        for layer, used in zip(config.decoder_bounds, found.kept, strict=False):
            bound, left = config.pruning.kept(config.spec, layer, size), int(used[row].sum())
            cropped = config.pruning.name == "vispruner" and row == 1
            assert left <= bound if cropped else left == bound
            text = np.asarray((rows.batch.vision_cell[row] == NO_CELL) & (rows.batch.segment_ids[row] > 0))
            assert np.all(used[row][text])


@pytest.mark.slow  # Recomputation is compiled for every length.
def test_cached_decoding_equals_recomputation(found, rows):
    """Without a cache: prompt and answers as one row, from which the tokens found above are dropped."""
    config, batch = found.model.config, rows.batch
    renumber = config.pruning.name != "fastv"
    levels = found.model.encode_images(batch)
    hidden = found.model.embed(batch, levels)
    positions = batch.positions[:, -1:] + 1 + np.arange(STEPS)
    answers = jnp.ones((3, STEPS), bool)
    inputs = DecoderInputs(
        hidden=jnp.concatenate([hidden, found.model.decoder.embed(ANSWERS)], axis=1),
        positions=jnp.concatenate([batch.positions, positions], axis=1),
        segment_ids=jnp.concatenate([batch.segment_ids, answers], axis=1),
    )
    keep = [jnp.concatenate([used, answers], axis=1) for used in found.kept]

    def recompute(model, inputs):
        def apply(k, inputs, state):
            return (drop(inputs, keep[k], renumber=renumber) if k < len(keep) else inputs), state

        hidden, _ = model.decoder(inputs, None, StageHook(apply, None))
        return model.logits(hidden[:, -STEPS - 1 :])

    expected = jax.jit(recompute)(found.model, inputs)
    np.testing.assert_allclose(found.prefill, expected[:, 0], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(found.decoded, expected[:, 1:], atol=1e-5, rtol=1e-5)
    assert float(jnp.std(expected)) > 0.1


def test_rows_do_not_depend_on_each_other(found, rows):
    prefill, decoded, _ = masked(found.model, rows.other_order, ANSWERS[[1, 2, 0]])
    np.testing.assert_allclose(prefill[:1], found.prefill[1:2], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(decoded[:1], found.decoded[1:2], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(decoded[2], found.decoded[0], atol=1e-5, rtol=1e-5)


def test_pruning_changes_the_answer_and_adds_no_parameters(found, rows):
    unpruned = model_with(None)
    shapes = [jax.eval_shape(merge_stages, flatten_params(model)) for model in (unpruned, found.model)]
    assert shapes[0] == shapes[1]
    logits = jax.jit(lambda model, batch: model.logits(model(batch)[0][:, -1]))(unpruned, rows.batch)
    changed = np.abs(logits - found.prefill).max(axis=1)
    assert np.all(changed[:2] > 1e-3)
    np.testing.assert_allclose(logits[2], found.prefill[2], atol=1e-5)  # text only


@pytest.mark.slow  # Each pruner is compiled again in bfloat16.
def test_bfloat16(found, rows):
    # Same cuts, other dtype: the modules hold it, so the model is built anew.
    config = dataclasses.replace(found.model.config, dtype="bfloat16")
    model = randomized(abstract_model(config))
    _, decoded, kept = masked(model, rows.batch, ANSWERS)
    assert np.all(np.isfinite(decoded))
    if config.pruning.name != "vispruner":  # where the crop hides some
        assert [used.sum() for used in kept] == [used.sum() for used in found.kept]


# --- budgets

TILE = PromptSize(text=0, cells=576, newlines=0, tiles=1)


def spec_of(layers: int) -> ModelSpec:
    return model_of(layers).spec


def model_of(layers: int, **changes) -> VlmConfig:
    """A VlmConfig of the paper's encoder with an uncompressed projector."""
    text = dataclasses.replace(TransformerConfig(), num_layers=layers)
    return VlmConfig(decoder=text, projector=MlpConfig(), **changes)


def average(pruning, layers: int, prompt: PromptSize = TILE) -> float:
    """Vision tokens per layer, as a fraction."""
    config = model_of(layers, pruning=pruning)
    kept = [config.pruning.kept(config.spec, layer, prompt) - prompt.text for layer in range(layers)]
    return sum(kept) / layers / prompt.vision


@pytest.mark.parametrize(("layers", "mean", "after"), [(24, 0.1852, 17), (28, 0.1746, 25)])
def test_fastv_budgets(layers, mean, after):
    """1/9 after layer 2 is 18.5 % of 24 layers; for a mean of 1/9, 3.03 % of 24 and 4.27 % of 28.

    The numbers are those of docs/design/methods.md#fastv.
    """
    assert average(FastVConfig(), layers) == pytest.approx(mean, abs=1e-4)
    matched = FastVConfig(budget="layer_average")
    assert average(matched, layers) == pytest.approx(1 / 9, abs=1e-3)
    assert matched.kept(spec_of(layers), 2, TILE) == after
    prompt = PromptSize(text=60, cells=5 * 576, newlines=48, tiles=5)
    assert [FastVConfig().kept(spec_of(layers), layer, prompt) for layer in (1, 2)] == [60 + 2928, 60 + 325]


@pytest.mark.parametrize(
    ("layers", "cuts", "base", "kept"),
    [(24, (2, 6, 12), 0.133, [576, 76, 10, 1]), (28, (2, 7, 14), 0.169, [576, 97, 16, 2])],
)
def test_pyramid_drop_budget(layers, cuts, base, kept):
    """The defaults and averages are those of docs/design/methods.md#pyramid-drop."""
    pruning, spec = PyramidDropConfig(), spec_of(layers)
    assert pruning.cuts(spec) == cuts
    assert pruning.fractions(spec) == (base, base**2, base**3)
    assert [pruning.kept(spec, layer, TILE) for layer in (1, *cuts)] == kept
    assert average(pruning, layers, PromptSize(text=0, cells=10**6, newlines=0, tiles=1)) == pytest.approx(
        1 / 9, abs=1e-4
    )


@pytest.mark.parametrize("budget", [1 / 9, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("layers", [9, 12, 18, 19, 32, 36, 48])
def test_pyramid_drop_scales_to_any_depth(layers, budget):
    pruning = PyramidDropConfig(budget=budget)
    assert average(pruning, layers, PromptSize(text=0, cells=10**6, newlines=0, tiles=1)) == pytest.approx(
        budget, rel=5e-3
    )
    assert pruning.cuts(spec_of(layers))[0] == (1 if layers < 10 or budget * layers < 2 else 2)


def test_a_rounding_that_only_float64_products_give():
    """0.5 * 45 rounds to the even 22; 1 - 0.889 is a little below 0.111; 0.29 * 100 is a little below 29."""
    assert FastVConfig(keep=1 - 0.5).count(spec_of(24), 45) == 22
    assert PyramidDropConfig(layers=(2,), ratios=(0.29,)).kept(
        spec_of(24), 2, PromptSize(text=0, cells=100, newlines=0, tiles=1)
    ) == int(0.29 * 100)
    assert int(0.29 * 100) == 28


def test_json_round_trip():
    for pruning in PRUNINGS.values():
        config = config_with(pruning)
        assert VlmConfig.from_dict(config.to_dict()) == config


# --- refusals


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: PrunerConfig.from_dict({"name": "fast"}),
            "did you mean 'fastv'. known names are fastv, pyramid_drop, vispruner",
        ),
        (lambda: FastVConfig(keep=1.5), "keep = 1.5"),
        (lambda: FastVConfig(budget="mean"), "budget = 'mean'"),
        (lambda: model_of(24, pruning=FastVConfig(layer=24)), r"layer = 24 outside the decoder; expected .* 1..23"),
        (lambda: FastVConfig(layer=0), "layer = 0: expected an integer >= 1"),
        (lambda: FastVConfig(layer=1.5), "expected an integer"),
        (
            lambda: model_of(12, pruning=FastVConfig(budget="layer_average")),
            "cannot fall below 0.1667, keep = 0.1111; raise keep",
        ),
        (lambda: model_of(8, pruning=PyramidDropConfig()), "cannot fall below 0.125, budget = 0.1111; raise budget"),
        (lambda: model_of(24, pruning=PyramidDropConfig(layers=(4, 8))), "cannot fall below 0.1667"),
        (lambda: model_of(24, pruning=PyramidDropConfig(layers=(4, 24))), r"do not fit a decoder of 24 layers"),
        (lambda: model_of(3, pruning=PyramidDropConfig(budget=0.9)), r"\(1, 2, 3\) do not fit a decoder of 3 layers"),
        (lambda: PyramidDropConfig(layers=(4, 2)), "strictly increasing"),
        (lambda: PyramidDropConfig(ratios=(0.2, 0.3)), "none above the one before"),
        (lambda: PyramidDropConfig(ratios=(0.2, -0.1)), "each element a finite number >= 0 and <= 1"),
        (lambda: PyramidDropConfig(budget=0), "budget = 0"),
        (lambda: model_of(24, pruning=PyramidDropConfig(ratios=(0.2, 0.1))), "2 ratios for 3 layers"),
        (lambda: VisPrunerConfig(tokens=0), "tokens = 0"),
        (lambda: VisPrunerConfig(important_ratio=2), "important_ratio = 2"),
        (lambda: model_of(24, pruning=VisPrunerConfig(tokens=577)), "tokens = 577 of a tile's 576"),
        # 576 - 31 is odd; four diverse tokens of at last twelve: a round would remove eight of six.
        (lambda: model_of(24, pruning=VisPrunerConfig(tokens=62)), r"545 patches \(576 - 31 important\)"),
        (lambda: model_of(24, pruning=VisPrunerConfig(tokens=8)), "remove 8 of 6"),
        (
            lambda: tiny_config(refusion=None, pruning=VisPrunerConfig(tokens=4)),
            "needs the projector 'mlp', one token per patch, found 'pool' with stride 2",
        ),
        (
            lambda: tiny_config(refusion=tiny_refusion(), pruning=FastVConfig()),
            "with re-fusion block 'vision_remember'",
        ),
        (lambda: model_of(24, pruning=FastVConfig(), image=anyres9_all36()), "bilinear branch"),
        (lambda: ModelTree(config_with(FastVConfig())), "pruners act at inference only; train without one"),
    ],
)
def test_refusals(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


def test_what_vispruner_accepts():
    """All tokens, only important ones, and an odd rest that needs no round."""
    for tokens, ratio in [(576, 0.5), (575, 1.0), (16, 1.0), (64, 0.5), (144, 0.5), (36, 0.5), (576, 1 / 576)]:
        model_of(24, pruning=VisPrunerConfig(tokens=tokens, important_ratio=ratio))


def test_lengths_without_a_pruner_are_refused(rows):
    model = abstract_model(config_with(None, decoder=tiny_decoder(num_layers=2)))
    with pytest.raises(ValueError, match="expected none without a pruner"):
        model.stage_hook({}, rows.batch, (5,))
