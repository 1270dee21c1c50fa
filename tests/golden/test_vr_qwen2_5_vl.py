"""Qwen2.5-VL, plain and with Vision Remember, against recorded outputs of transformers' model."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from tests.golden.discovery import Case, cases
from tests.qwen2_5_vl import Inputs, inputs_of, load_model, model_config
from vr_jax.model.config import VlmConfig
from vr_jax.model.decoders.stages import StageHook
from vr_jax.model.refusion.vision_remember import VisionRememberConfig
from vr_jax.model.vlm import VisionLanguageModel

ITEM = "vr_qwen2_5_vl"
# Each case compiles a model of its own. The quick ones are an image without Vision Remember, and two images with it.
SLOW = ("vr_single", "vr_odd_shape", "vr_decode", "vr_batch_left_pad", "plain_batch_left_pad", "plain_two_images")
FOUND = [p for p in cases(ITEM, slow=SLOW) if p.values[0] is None or p.values[0].kind != "processor"]


def config_of(case: Case, cross_attention: str = "absorbed") -> VlmConfig:
    c = case.config
    refusion = None
    if case.kind == "vr":
        refusion = VisionRememberConfig(
            insert_after=tuple(layer + 1 for layer in c["after_layers"]),
            levels=taps(case),
            cross_attention=cross_attention,
            cross_heads=c["heads_cross"],
            self_heads=c["heads_self"],
        )
    return model_config(c["vision_config"], c["text_config"], tied=c["tie_word_embeddings"], refusion=refusion)


def taps(case: Case) -> tuple[int, ...]:
    """The hidden states that the case recorded: state i is the output of i blocks."""
    return tuple(block + 1 for block in case.config["taps_block_index_0based"])


def inputs_from(case: Case, config: VlmConfig) -> Inputs:
    x = case.inputs
    return inputs_of(
        config,
        x["input_ids"],
        x["attention_mask"],
        x["pixel_values"],
        x["image_grid_thw"].tolist(),
        image_token=case.config["image_token_id"],
        text_select=x.get("text_select"),
    )


def prefill(model: VisionLanguageModel, patches: Any, batch: Any, levels: tuple[int, ...], length: int):
    """Everything that a case records of the prefill; for each insertion, the states around and within it."""
    places = batch.tile_places
    wanted = tuple(sorted({*levels, *model.config.feature_levels}))
    states = dict(zip(wanted, model.encoder.states(patches, wanted, places), strict=True))
    hook, insertions = model.stage_hook(states, batch), []

    def apply(k, inputs, state):
        after, state = hook.apply(k, inputs, state)
        if after is not inputs:
            vision, block = model.vision_context(states, batch), model.refusion.block(len(insertions))
            text_token, _ = block._text_token(inputs.hidden, vision)  # noqa: SLF001  # only this part is compared
            cross = block.cross(inputs.hidden, vision)
            insertions.append((inputs.hidden, cross, text_token, after.hidden))
        return after, state

    embeds = model.embed(batch, states)
    cache = model.init_cache(batch.tokens.shape[0], length)
    spied = None if hook is None else StageHook(apply, hook.state)
    hidden, cache = model.decoder(model.inputs(states, batch), cache, spied)
    merged = model.projector(states[model.config.vision_feature_layer])
    return [states[level] for level in levels], merged, embeds, insertions, model.logits(hidden), cache


@pytest.mark.parametrize("case", FOUND)
def test_the_absorbed_form(case: Case):
    check(case, "absorbed")


@pytest.mark.slow  # The absorbed form is the same function, and tests/model compares the two.
@pytest.mark.parametrize("case", [p for p in FOUND if p.values[0] is None or p.values[0].kind == "vr"])
def test_the_plain_form(case: Case):
    check(case, "plain")


def check(case: Case, cross_attention: str) -> None:
    """Compares everything that a case recorded, in a prefill and in the decoding of its tokens."""
    config = config_of(case, cross_attention)
    data, real, out = inputs_from(case, config), case.inputs["attention_mask"], case.outputs
    batch, (rows, cells) = data.batch, data.merged
    ours = np.stack([batch.positions, *np.moveaxis(np.asarray(batch.grid_positions), -1, 0)])
    np.testing.assert_array_equal(ours[:, real], case.inputs["position_ids"][:, real])

    model = load_model(config, case.weights)
    steps, length = out["greedy_tokens"].shape[1], real.shape[1]
    run = jax.jit(prefill, static_argnums=(3, 4))
    states, merged, embeds, insertions, logits, cache = run(model, data.patches, batch, taps(case), length + steps)

    near = case.tolerance("features, merged, embeds, hidden, t")
    for state, expected in zip(states, out["features"], strict=True):
        flat = np.asarray(state).reshape(len(real), -1, *state.shape[3:])
        np.testing.assert_allclose(flat[rows, cells], expected, **near)
    merged = np.asarray(merged).reshape(len(real), -1, merged.shape[-1])
    np.testing.assert_allclose(merged[rows, cells], out["merged"], **near)
    np.testing.assert_allclose(np.asarray(embeds)[real], out["inputs_embeds"][real], **near)
    assert len(insertions) == (len(case.config["after_layers"]) if case.kind == "vr" else 0)
    for i, insertion in enumerate(insertions):
        before, cross, text_token, after = (np.asarray(x) for x in insertion)
        np.testing.assert_allclose(before[real], out[f"hidden_before_vr{i}"][real], **near)
        np.testing.assert_allclose(after[real], out[f"hidden_after_vr{i}"][real], **near)
        np.testing.assert_allclose(cross[real & (np.asarray(batch.vision_cell) >= 0)], out[f"after_cross{i}"], **near)
        np.testing.assert_allclose(text_token[:, 0], out[f"t{i}"], **near)
    far = case.tolerance("logits")
    np.testing.assert_allclose(np.asarray(logits)[real], out["prefill_logits"][real], **far)

    @jax.jit
    def decode(model, token, positions, cache):
        hidden, cache = model.decode(token, positions, cache)
        return model.logits(hidden)[:, 0], cache

    logits, greedy = np.asarray(logits)[:, -1], []
    for step in range(steps):
        token = np.argmax(logits, axis=-1).astype(np.int32)[:, None]
        greedy.append(token[:, 0])
        positions = np.asarray(batch.positions)[:, -1:] + 1 + step
        np.testing.assert_array_equal(positions[:, 0], out["decode_position_ids"][:, step])
        logits, cache = decode(model, token, positions, cache)
        np.testing.assert_allclose(logits, out["decode_logits"][:, step], **far)
    np.testing.assert_array_equal(np.stack(greedy, axis=1), out["greedy_tokens"])
