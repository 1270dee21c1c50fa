"""Vision Remember in MiniCPM-V 2.0 against recorded outputs of an independent torch implementation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import minicpm
from tests.golden.discovery import Case, cases
from tests.tiny import quick
from vr_jax.model.batch import NO_CELL, Batch
from vr_jax.model.config import VlmConfig
from vr_jax.model.decoders.stages import StageHook
from vr_jax.model.refusion.vision_remember import VisionRememberConfig
from vr_jax.model.vlm import VisionLanguageModel
from vr_jax.model.windows import adaptive_windows, window_bounds

ALL = cases("vr_minicpm_v", known=("vr_minicpm_v",))
# Each compiles a model of its own. The one that is not slow has windows of several sizes, and two grids in an image.
SOME = cases("vr_minicpm_v", known=("vr_minicpm_v",), slow=("square_sliced_divisible", "two_images", "batch_left_pad"))


def model_config(case: Case, cross_attention: str) -> VlmConfig:
    c = case.config
    return minicpm.model_config(
        c["vision"],
        minicpm.decoder_config(c["llm"]),
        blocks=c["kept_blocks"],
        queries=c["n"],
        heads=c["resampler_heads"],
        slot=minicpm.slot_side(c["slice_grids_hw"], c["n"]),
        refusion=VisionRememberConfig(
            insert_after=tuple(layer + 1 for layer in c["after_layers"]),
            levels=tuple(c["levels_after_blocks_1based"]),
            cross_attention=cross_attention,
            cross_heads=c["heads_cross"],
            self_heads=c["heads_self"],
        ),
    )


def recorded_batch(case: Case, config: VlmConfig) -> tuple[Batch, list[list[int]]]:
    """The case's batch, and the numbers of the slices of each row."""
    given, c = case.inputs, case.config
    index, image = given["vision_index"], np.asarray(c["slice_image"])
    rows, cells = [], np.full(index.shape[:2], NO_CELL)
    for b, row in enumerate(index):
        vision = row[:, 0] >= 0
        numbers = sorted(set(row[vision, 1].tolist()))
        slot = {number: t for t, number in enumerate(numbers)}
        cells[b, vision] = [slot[s] * c["n"] ** 2 + i * c["n"] + j for _, s, i, j in row[vision]]
        rows.append(numbers)
    batch = minicpm.batch(
        config,
        [[given[f"slice_{k}"] for k in row] for row in rows],
        [(1 + image[row] - image[row].min()).tolist() if row else [] for row in rows],
        given["input_ids"],
        cells,
        mask=given["attention_mask"],
        positions=given["position_ids"],
        text_select=given["text_select"],
    )
    return batch, rows


@pytest.mark.parametrize("case", ALL)
def test_windows(case: Case):
    grids, n, bounds = case.inputs["slice_grid"], case.config["n"], case.outputs["window_bounds"]
    np.testing.assert_array_equal(grids, case.config["slice_grids_hw"])
    found = np.stack([b for axis in (0, 1) for b in window_bounds(jnp.asarray(grids[:, axis]), n)], axis=-1)
    np.testing.assert_array_equal(found, bounds)
    slots = model_config(case, "absorbed").window_slots
    patch, valid = (np.asarray(x) for x in jax.jit(adaptive_windows, static_argnums=(1, 2))(grids, n, slots))
    for s, (rows, columns) in enumerate(grids):
        raster = np.arange(rows * columns).reshape(rows, columns)
        for i in range(n):
            for j in range(n):
                (top, bottom), (left, right) = bounds[s, i, :2], bounds[s, j, 2:]
                own = patch[s, i * n + j][valid[s, i * n + j]]
                np.testing.assert_array_equal(own, raster[top:bottom, left:right].ravel())
    sizes = valid.sum(-1)
    assert [sizes.min(), sizes.max()] == case.config["keys_per_window"]


@jax.jit
def run_blocks(model: VisionLanguageModel, batch: Batch):
    """The states before and after each block, and the block's own parts."""
    levels = model.encode_images(batch)
    context, hook = model.vision_context(levels, batch), model.stage_hook(levels, batch)
    refusion = model.refusion
    found = []

    def apply(k, inputs, state):
        if k == 0:
            return hook.apply(k, inputs, state)
        block = refusion.block(len(found))
        after, state = hook.apply(k, inputs, state)
        text_token, _ = block._text_token(inputs.hidden, context)  # noqa: SLF001  # only this part is compared
        found.append((inputs.hidden, after.hidden, block.cross(inputs.hidden, context), text_token))
        return after, state

    inputs = model.inputs(levels, batch)
    model.decoder.hidden_states(inputs, (model.config.decoder.num_layers,), StageHook(apply, hook.state))
    tokens = model.projector(levels[model.config.vision_feature_layer], places=batch.tile_places)
    return levels, inputs, tokens, found


@pytest.mark.parametrize("cross_attention", quick(["absorbed", "plain"], "absorbed"))
@pytest.mark.parametrize("case", SOME)
def test_model(case: Case, cross_attention: str):
    given, expected, tolerance = case.inputs, case.outputs, case.tolerance("features, embeds, hidden, t")
    config = model_config(case, cross_attention)
    model = minicpm.load(config, case.weights)
    batch, rows = recorded_batch(case, config)
    levels, inputs, tokens, found = run_blocks(model, batch)
    mask, vision = given["attention_mask"], given["vision_index"][..., 0] >= 0

    places = [(b, t) for b, row in enumerate(rows) for t in range(len(row))]
    order = [number for row in rows for number in row]
    assert order == list(range(len(given["slice_grid"])))
    states = [levels[level] for level in config.refusion.levels]
    sizes = given["slice_grid"].prod(axis=1)
    features = [np.concatenate([x[b, t, 0, :s] for (b, t), s in zip(places, sizes, strict=True)]) for x in states]
    np.testing.assert_allclose(np.stack(features), expected["features"], **tolerance)
    np.testing.assert_allclose([tokens[b, t] for b, t in places], expected["vision_hidden_states"], **tolerance)
    np.testing.assert_allclose(inputs.hidden[mask], expected["inputs_embeds"][mask], **tolerance)
    assert len(found) == len(config.refusion.insert_after)
    for i, (before, after, cross, text_token) in enumerate(found):
        np.testing.assert_allclose(before[mask], expected[f"hidden_before_vr{i}"][mask], **tolerance)
        np.testing.assert_allclose(after[mask], expected[f"hidden_after_vr{i}"][mask], **tolerance)
        np.testing.assert_allclose(cross[vision], expected[f"after_cross{i}"], **tolerance)
        np.testing.assert_array_equal(after[~vision], before[~vision])
        for b in np.flatnonzero(vision.any(axis=1)):
            np.testing.assert_allclose(text_token[b, 0], expected[f"t{i}"][b], **tolerance)

    result = minicpm.greedy(model, inputs, expected["greedy_tokens"].shape[1], batch, levels)
    logits = case.tolerance("logits")
    np.testing.assert_allclose(result.logits[mask], expected["prefill_logits"][mask], **logits)
    np.testing.assert_array_equal(result.tokens, expected["greedy_tokens"])
    np.testing.assert_allclose(result.decoded, expected["decode_logits"], **logits)
