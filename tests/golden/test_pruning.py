"""Pruners against the recorded outputs of the official code: index sets, rankings, logits and greedy tokens."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import torch_weights
from tests.golden.discovery import Case, cases
from tests.tiny import tiny_encoder
from vr_jax.convert.tables import TEXT, VISION
from vr_jax.data import anyres
from vr_jax.model.batch import NO_CELL, Batch
from vr_jax.model.config import ImageConfig, VlmConfig
from vr_jax.model.decoders.stages import DecoderInputs, StageHook
from vr_jax.model.decoders.transformer import Decoder, TransformerConfig
from vr_jax.model.encoders.siglip import Siglip, SiglipConfig
from vr_jax.model.projectors.mlp import MlpConfig
from vr_jax.model.pruning.fastv import FastVConfig
from vr_jax.model.pruning.pyramid_drop import PyramidDropConfig
from vr_jax.model.pruning.vispruner import VisPrunerConfig, select, selected
from vr_jax.model.registry import PrunerConfig
from vr_jax.model.spec import PromptSize
from vr_jax.model.vlm import VisionLanguageModel, abstract_model

KINDS = ("vispruner", "siglip", "vispruner_pack", "fastv", "pdrop")


def of_kind(*kinds: str) -> list:
    """Cases of these kinds; those of a kind that no test knows stay, marked as skipped."""
    return [p for p in cases("pruning", KINDS) if p.values[0] is None or p.values[0].kind in kinds]


def test_every_kind_has_a_test():
    assert {p.values[0].kind for p in cases("pruning") if p.values[0] is not None} <= set(KINDS)


# --- VisPruner


def masks_of(features, attentions, config: VisPrunerConfig):
    """Selected patches of every tile, and the lists they come from."""
    diverse = config.tokens - config.important
    choose = jax.jit(jax.vmap(lambda f, a: select(f, a, config.important, diverse)))
    important, residual = choose(features, attentions.mean(axis=1))
    chosen = np.concatenate([important, residual], axis=1)
    masks = np.zeros(features.shape[:2], bool)
    np.put_along_axis(masks, chosen, True, axis=1)
    return masks, important, residual


@pytest.mark.parametrize("case", of_kind("vispruner"))
def test_vispruner_selection(case: Case):
    config = VisPrunerConfig(tokens=case.config["T"], important_ratio=case.config["r"])
    masks, important, residual = masks_of(case.inputs["features"], case.inputs["attentions"], config)
    np.testing.assert_array_equal(important, case.outputs["important"])
    np.testing.assert_array_equal(residual, case.outputs["residual"])
    np.testing.assert_array_equal(masks, case.outputs["index_masks"])


@pytest.mark.parametrize("case", of_kind("vispruner_pack"))
def test_vispruner_packing(case: Case):
    """Which token stands where: base, then the stitched rows of the grid, in `image.unpad` False."""
    c = case.config
    config = VisPrunerConfig(tokens=c["T"], important_ratio=c["r"])
    kept = masks_of(case.inputs["features"], case.inputs["attentions"], config)[0].reshape(-1)
    tile_size = 384
    pinpoints = ((2 * tile_size,) * 2,) if c["grid_mode"] == "official_fixed_2x2" else c["pinpoints"]
    grids = tuple((w // tile_size, h // tile_size) for w, h in pinpoints)
    image = config.adapt_image(ImageConfig(tile_size=tile_size, aspect_ratio=c["mode"], grids=grids))
    begin = 0
    for size, tiles, embeds, mask in zip(
        c["sizes"], c["tiles"], case.outputs["embeds"], case.outputs["attention_mask"], strict=True
    ):
        layout = anyres.layout(tuple(size), c["u"], image)
        assert layout.tiles == tiles
        cell = layout.cell + begin * c["u"] ** 2
        np.testing.assert_array_equal(cell[kept[cell]], embeds[mask][1:-1])  # between two text tokens
        prompt = PromptSize(text=2, cells=len(cell), newlines=0, tiles=tiles)
        assert config.kept(None, 0, prompt) == mask.sum()
        begin += tiles


@pytest.mark.parametrize("case", of_kind("siglip"))
def test_vispruner_in_the_encoder(case: Case):
    c = case.config
    vision = SiglipConfig(
        hidden_size=c["hidden"],
        intermediate_size=c["inter"],
        num_layers=c["layers"],
        num_heads=c["heads"],
        image_size=c["image"],
        patch_size=c["patch"],
    )
    pruning = VisPrunerConfig(tokens=c["T"], important_ratio=c["r"])
    config = VlmConfig(
        encoder=vision,
        decoder=TransformerConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2, num_kv_heads=1
        ),
        projector=MlpConfig(),
        pruning=pruning,
        image=ImageConfig(tile_size=c["image"], aspect_ratio="square"),
        vision_feature_layer=c["layers"] - 1,
    )
    everything = tuple(range(c["layers"] + 1))

    def tower(bounds):
        build = lambda: Siglip(vision, stride=1, bounds=bounds, dtype=jnp.float32, rngs=nnx.Rngs(0))  # noqa: E731
        return torch_weights.load(nnx.eval_shape(build), VISION, case.weights, "encoder.")

    @jax.jit
    def hidden_states(siglip, patches):
        # The recorded pixels are no bytes, as __call__ takes them: the patch embedding is computed here.
        x = siglip.patch_embed(patches) + siglip.position_embedding[...]
        states = [x]
        for stage in siglip.stages:
            states.append(jax.tree.map(lambda leaf: leaf[0], stage)(states[-1]))
        return states

    pixels = case.inputs["pixel_values"].transpose(0, 2, 3, 1)
    side, size = vision.grid, c["patch"]
    patches = pixels.reshape(len(pixels), side, size, side, size, 3).swapaxes(2, 3).reshape(len(pixels), side**2, -1)
    states = hidden_states(tower(everything), patches)
    tolerance = case.tolerance("siglip hidden/attention")
    for number, state in enumerate(states):
        np.testing.assert_allclose(state, case.outputs[f"hidden_states_{number}"], **tolerance)
    np.testing.assert_array_equal(case.outputs["features"], case.outputs[f"hidden_states_{c['layers'] - 1}"])

    choose = jax.jit(lambda siglip, hidden: selected(pruning, siglip, hidden, hidden))
    for siglip in (tower(config.encoder_bounds), tower((0, c["layers"]))):  # the last stage may hold more
        hidden = states[-2][:, :, None]
        received = siglip.received_attention(hidden)[..., 0]
        np.testing.assert_allclose(received, case.outputs["attentions"], **tolerance)
        np.testing.assert_array_equal(choose(siglip, hidden[None])[0], case.outputs["index_masks"])


# --- FastV and PyramidDrop


def pruner_of(case: Case) -> PrunerConfig:
    c = case.config
    if case.kind == "fastv":
        return FastVConfig(layer=c["K"], keep=1 - c["R"])
    return PyramidDropConfig(layers=tuple(c["layer_list"]), ratios=tuple(c["ratios"]))


def recorded_model(case: Case, pruning: PrunerConfig | None) -> VisionLanguageModel:
    """The recorded decoder in a model whose encoder is not used."""
    qwen, vision = case.spec["qwen"], tiny_encoder(num_layers=1)
    text = TransformerConfig(
        **{
            f.name: qwen[f.name]
            for f in dataclasses.fields(TransformerConfig)
            if f.name in qwen and f.name != "num_layers"
        },
        num_layers=qwen["num_hidden_layers"],
        num_heads=qwen["num_attention_heads"],
        num_kv_heads=qwen["num_key_value_heads"],
    )
    assert text.head_dim == qwen["head_dim"]
    assert text.tie_word_embeddings
    config = VlmConfig(
        encoder=vision,
        decoder=text,
        projector=MlpConfig(),
        pruning=pruning,
        image=ImageConfig(tile_size=vision.image_size, aspect_ratio="square"),
        vision_feature_layer=1,
    )
    model = abstract_model(config)
    weights = {name.removeprefix("model."): value for name, value in case.weights.items()}
    model.decoder = torch_weights.load(model.decoder, TEXT, weights, "decoder.")
    model.encoder = model.projector = model.image_newline = None
    return model


def batch_of(case: Case) -> Batch:
    start, count, length = (case.config[name] for name in ("start", "N", "L"))
    cell = np.full((1, length), NO_CELL, np.int32)
    cell[0, start : start + count] = np.arange(count)
    ones = np.ones((1, length), np.int32)
    return Batch(
        tokens=0 * ones,
        positions=np.arange(length, dtype=np.int32)[None],
        segment_ids=ones,
        loss_mask=ones < 0,
        text_token_mask=ones < 0,
        vision_cell=cell,
        tile_pixels=np.zeros((1, 1, 24, 24, 3), np.uint8),
        tile_segment=ones[:, :1],
        tile_image=ones[:, :1],
    )


def prefill(model: VisionLanguageModel, embeds, batch: Batch, lengths, steps: int):
    """Hidden states, cache, and before each stage: its input's slots in the row, and the ranking where it stands."""
    found = []
    hook = model.stage_hook({}, batch, lengths)
    slots = jnp.arange(embeds.shape[1])[None]

    def apply(k, inputs, state):
        after, state = hook.apply(k, inputs, state)
        if k < len(model.decoder.stages):
            found.append((after, model.decoder.last_token_attention(k, inputs)))
        return after, state

    length = embeds.shape[1]
    cache = model.init_cache(1, [n + steps for n in lengths] if lengths else length + steps)
    inputs = DecoderInputs(hidden=embeds, positions=slots, segment_ids=batch.segment_ids)
    hidden, cache = model.decoder(inputs, cache, StageHook(apply, hook.state))
    return model.logits(hidden), cache, found


# The ordinary tests run one case of each pruner in the form that generation uses, the slow ones all cases in both.
@pytest.mark.parametrize(
    ("case", "compaction"),
    [
        pytest.param(
            *parameter.values,
            compaction,
            id=f"{parameter.id}-{'compacted' if compaction else 'masked'}",
            marks=[*parameter.marks, *([] if compaction and number % 3 == 0 else [pytest.mark.slow])],
        )
        for number, parameter in enumerate(of_kind("fastv", "pdrop"))
        for compaction in (True, False)
    ],
)
def test_decoder(case: Case, compaction: bool):
    pruning = pruner_of(case)
    model, batch = recorded_model(case, pruning), batch_of(case)
    bounds, count, length = model.config.decoder_bounds, case.config["N"], case.config["L"]
    prompt = PromptSize(text=length - count, cells=count, newlines=0, tiles=1)
    kept = tuple(pruning.kept(model.config.spec, layer, prompt) for layer in bounds[:-1])
    steps = len(case.outputs["greedy_tokens"])
    embeds = jnp.asarray(case.inputs["inputs_embeds"])
    tolerance, score_tolerance = case.tolerance("logits"), case.tolerance("scores")

    run = jax.jit(prefill, static_argnames=("lengths", "steps"))
    logits, cache, found = run(model, embeds, batch, kept if compaction else None, steps)

    # Which slots are left: followed by the stage's positions where they are kept, by the masks otherwise.
    recorded = _recorded_drops(case)
    previous = np.arange(length)
    for k, (after, _) in enumerate(found):
        used = np.asarray(after.segment_ids[0] > 0)
        assert used.sum() == kept[k]
        if bounds[k] in recorded:
            keep, scores = recorded[bounds[k]]
            if case.kind == "fastv":
                np.testing.assert_array_equal(after.positions[0][used], keep)
                assert not cache[k].shift.any()
            else:
                np.testing.assert_array_equal(after.positions[0][used], np.arange(len(keep)))
                assert int(cache[k].shift[0]) == length - len(keep)
            if not compaction:
                np.testing.assert_array_equal(np.flatnonzero(used), keep)
            ranked = np.asarray(found[k - 1 if case.kind == "fastv" else k][1][0])
            alive = np.asarray(found[k - 1][0].segment_ids[0] > 0)
            image = np.isin(previous, np.flatnonzero(batch.vision_cell[0] >= 0))
            np.testing.assert_allclose(ranked[alive][image], scores, **score_tolerance)
            previous = keep
    logits = np.asarray(logits[0])
    if not compaction:
        logits = logits[np.asarray(found[-1][0].segment_ids[0] > 0)]
    np.testing.assert_allclose(logits, case.outputs["prefill_logits"], **tolerance)

    decode = jax.jit(lambda model, token, position, cache: model.decode(token, position, cache))
    tokens, rows = [int(np.argmax(logits[-1]))], []
    for step in range(steps):
        hidden, cache = decode(model, np.array([[tokens[-1]]]), np.array([[length + step]]), cache)
        rows.append(np.asarray(model.logits(hidden)[0, 0]))
        tokens.append(int(np.argmax(rows[-1])))
    assert tokens[:steps] == case.outputs["greedy_tokens"].tolist()
    np.testing.assert_allclose(rows, case.outputs["decode_logits"], **tolerance)
    for k, stage in enumerate(cache):
        attended = np.asarray(stage.valid.sum(axis=1))[0]
        assert set(case.outputs["kv_lengths"][bounds[k] : bounds[k + 1]]) == {attended}
        if compaction:
            assert stage.keys.shape[3] == attended


def _recorded_drops(case: Case) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Layer before which tokens are dropped -> the slots left, and the scores of the vision tokens before."""
    if case.kind == "fastv":
        return {case.config["K"]: (case.outputs["keep_indices"], case.outputs["rank_row"])}
    return {
        layer: (case.outputs[f"keep_stage{i}"], case.outputs[f"rank_stage{i}"])
        for i, layer in enumerate(case.config["layer_list"])
    }


@pytest.mark.slow  # model/decoders/test_transformer.py compares the decoder without pruner.
@pytest.mark.parametrize("case", of_kind("fastv", "pdrop"))
def test_without_pruning(case: Case):
    model: Decoder = recorded_model(case, None).decoder
    tokens = case.outputs["greedy_tokens"]
    embeds = jnp.concatenate([case.inputs["inputs_embeds"], model.embed(tokens[None])], axis=1)
    positions = jnp.arange(embeds.shape[1])[None]
    hidden, _ = jax.jit(lambda model, inputs: model(inputs))(
        model, DecoderInputs(hidden=embeds, positions=positions, segment_ids=jnp.ones_like(positions))
    )
    logits = hidden[0] @ model.embed.embedding[...].T
    np.testing.assert_allclose(logits, case.outputs["logits_noprune"], **case.tolerance("logits"))
