"""MiniCPM-V 2.0 against recorded outputs of the official code: vision tower, resampler, decoder and the whole."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest

from tests import minicpm, torch_weights
from tests.golden.discovery import Case, cases, documents
from tests.minicpm import PATCH_SIZE
from tests.tiny import random_model
from vr_jax.convert.tables import HEAD, TEXT, prefixed
from vr_jax.model.batch import NO_CELL, TilePlaces
from vr_jax.model.config import ImageConfig, VlmConfig
from vr_jax.model.decoders.stages import DecoderInputs
from vr_jax.model.decoders.transformer import TransformerConfig
from vr_jax.model.encoders.siglip_slices import SiglipSlicesConfig
from vr_jax.model.projectors.resampler import ResamplerConfig
from vr_jax.model.refusion.vision_remember import VisionRememberConfig
from vr_jax.model.vlm import VisionLanguageModel, abstract_model

KINDS = ("vision", "llm", "whole")


def of_kind(kind: str) -> list:
    # Each case compiles a model of its own; one of each kind is quick.
    slow = ("whole_one_sliced", "whole_two_images_two_turns", "llm_mha_right_pad", "llm_mqa_inputs_embeds")
    found = cases("minicpm_v", known=KINDS, slow=slow)
    return [p for p in found if p.values[0] is None or p.values[0].kind not in KINDS or p.values[0].kind == kind]


def slices_of(arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
    return [arrays[f"slice_{k}"] for k in range(sum(name.startswith("slice_") for name in arrays))]


@jax.jit
def read(model: VisionLanguageModel, pixels, places):
    """Every hidden state, the resized positions, and the result of the resampler."""
    levels = tuple(range(model.config.encoder.last_level + 1))
    states = model.encoder(pixels, levels, places)
    return states, model.encoder.positions(places.extent[0]), model.projector(states[-1], places=places)


@pytest.mark.parametrize("case", of_kind("vision"))
def test_vision(case: Case):
    c, expected, pieces = case.config, case.outputs, slices_of(case.inputs)
    side = round(c["query_num"] ** 0.5)
    grids = [[size // PATCH_SIZE for size in piece.shape[:2]] for piece in pieces]
    assert grids == c["slice_grids_hw"]
    decoder = TransformerConfig(
        vocab_size=2, hidden_size=c["resampler_width"], intermediate_size=4, num_layers=1, num_heads=1, num_kv_heads=1
    )
    config = minicpm.model_config(
        c["vision"],
        decoder,
        blocks=c["kept_blocks"],
        queries=side,
        heads=c["resampler_heads"],
        slot=minicpm.slot_side(grids, side),
        # A re-fusion block that reads every level, so that every level is a bound of a stage.
        refusion=VisionRememberConfig(insert_after=(1,), levels=tuple(range(c["kept_blocks"] + 1)), cross_heads=1),
    )
    model = random_model(config)
    weights = {name: value for name, value in case.weights.items() if name != "resampler.pos_embed"}
    weights["vpm.pos_embed"] = weights["vpm.pos_embed"][0]
    vision, resampler = ({n: x for n, x in weights.items() if n.startswith(part)} for part in ("vpm.", "resampler."))
    model.encoder = torch_weights.load(model.encoder, minicpm.TABLE, vision, "encoder.")
    model.projector = torch_weights.load(model.projector, minicpm.TABLE, resampler, "projector.")

    batch = minicpm.batch(config, [pieces], [[1] * len(pieces)], np.zeros((1, 1), np.int32), np.full((1, 1), NO_CELL))
    # An unused slot follows.
    pixels = np.concatenate([batch.tile_pixels, batch.tile_pixels[:, :1]], axis=1)
    extent = np.concatenate([batch.tile_extent, np.zeros((1, 1, 2), np.int32)], axis=1)
    places = TilePlaces(image=np.concatenate([batch.tile_image, np.zeros((1, 1), np.int32)], axis=1), extent=extent)
    states, positions, tokens = read(model, pixels, places)
    assert all(np.isfinite(x).all() for x in (*states, positions, tokens))
    vision, pos = case.tolerance("vision, embeds"), case.tolerance("pos_embed")
    for k, (rows, columns) in enumerate(grids):
        own = slice(rows * columns)
        np.testing.assert_allclose(positions[k, own], expected[f"pos_embed_{k}"], **pos)
        blocks = np.stack([state[0, k, 0, own] for state in states[1:-1]])
        np.testing.assert_allclose(blocks, expected[f"blocks_{k}"], **vision)
        np.testing.assert_allclose(states[-1][0, k, 0, own], expected[f"features_{k}"], **vision)
        np.testing.assert_allclose(tokens[0, k], expected[f"resampled_{k}"], **vision)


def text_model(case: Case) -> VisionLanguageModel:
    decoder = minicpm.decoder_config(case.config["llm"])
    vision = {"img_size": 28, "embed_dim": 4, "num_heads": 1, "mlp_ratio": 1, "patch_size": PATCH_SIZE}
    model = random_model(minicpm.model_config(vision, decoder, blocks=1, queries=1, heads=1, slot=2))
    table = (*prefixed("model.", TEXT), *HEAD)
    weights = {name.removeprefix("llm."): value for name, value in case.weights.items()}
    model.decoder = torch_weights.load(model.decoder, table, weights, "decoder.")
    return model


@pytest.mark.parametrize("case", of_kind("llm"))
def test_decoder(case: Case):
    given, expected = case.inputs, case.outputs
    model = text_model(case)
    length = expected["logits"].shape[1]
    if "inputs_embeds" in given:
        mask = np.ones((1, length), bool)
        inputs = DecoderInputs(
            hidden=given["inputs_embeds"],
            positions=np.arange(length, dtype=np.int32)[None],
            segment_ids=mask.astype(np.int32),
        )
    else:
        mask = given["attention_mask"]
        batch = minicpm.batch(
            model.config,
            [[]] * len(mask),
            [[]] * len(mask),
            given["input_ids"],
            np.full(mask.shape, NO_CELL),
            mask=mask,
            positions=given.get("position_ids"),
        )
        inputs = model.inputs(model.encode_images(batch), batch)
    steps = expected["greedy_tokens"].shape[1]
    found = minicpm.greedy(model, inputs, steps)
    tolerance = case.tolerance("logits")
    np.testing.assert_allclose(found.logits[mask], expected["logits"][mask], **tolerance)
    np.testing.assert_array_equal(found.tokens, expected["greedy_tokens"])
    np.testing.assert_allclose(found.decoded, expected["decode_logits"], **tolerance)
    if "hidden_states" in expected:
        compare_states(model, inputs, expected["hidden_states"], case)


def compare_states(model: VisionLanguageModel, inputs: DecoderInputs, expected: np.ndarray, case: Case) -> None:
    """The input of every layer, then the state after the last norm."""
    depth = model.config.decoder.num_layers
    after = jax.jit(lambda model, inputs: model.decoder.hidden_states(inputs, range(1, depth)).after)(model, inputs)
    last = jax.jit(lambda model, inputs: model.decoder(inputs)[0])(model, inputs)
    states = [inputs.hidden, *(after[layer] for layer in range(1, depth)), last / model.config.decoder.logit_scale]
    np.testing.assert_allclose(np.stack([s[0] for s in states]), expected, **case.tolerance("llm hidden_states"))


def cells_of(bounds: np.ndarray, length: int) -> np.ndarray:
    """The cell of each token (1, N), from the first token of each slice's queries and the one after the last."""
    cell = np.full((1, length), NO_CELL)
    for start, stop in bounds:
        count = stop - start
        cell[0, start:stop] = np.arange(count) + count * (np.asarray(bounds)[:, 0] < start).sum()
    return cell


@pytest.mark.parametrize("case", of_kind("whole"))
def test_whole_model(case: Case):
    c, given, expected = case.config, case.inputs, case.outputs
    side, pieces = round(c["query_num"] ** 0.5), slices_of(expected)
    config = minicpm.model_config(
        c["vision"],
        minicpm.decoder_config(c["llm"]),
        blocks=c["kept_blocks"],
        queries=side,
        heads=c["resampler_heads"],
        slot=minicpm.slot_side(c["slice_grids_hw"], side),
    )
    model = minicpm.load(config, case.weights)
    # The order of the slices says which image each belongs to; nothing reads it without Vision Remember.
    cell = cells_of(given["image_bounds"], given["input_ids"].shape[1])
    batch = minicpm.batch(config, [pieces], [[1] * len(pieces)], given["input_ids"], cell)

    levels = jax.jit(lambda model, batch: model.encode_images(batch))(model, batch)
    inputs = jax.jit(lambda model, levels, batch: model.inputs(levels, batch))(model, levels, batch)
    tokens = jax.jit(lambda model, x, places: model.projector(x, places=places))(
        model, levels[config.vision_feature_layer], batch.tile_places
    )
    embeds, logits = case.tolerance("vision, embeds"), case.tolerance("logits")
    np.testing.assert_allclose(tokens[0], expected["vision_hidden_states"], **embeds)
    np.testing.assert_allclose(inputs.hidden, expected["inputs_embeds"], **embeds)
    found = minicpm.greedy(model, inputs, len(expected["greedy_tokens"]), batch, levels)
    np.testing.assert_allclose(found.logits, expected["logits"], **logits)
    np.testing.assert_array_equal(found.tokens[0], expected["greedy_tokens"])
    np.testing.assert_allclose(found.decoded[0], expected["decode_logits"], **logits)


def released(**changes) -> VlmConfig:
    """The released model, of the recorded `config.json`."""
    layout = layouts()
    decoder = minicpm.decoder_config(layout["config.json"])
    return VlmConfig(
        **{
            "encoder": SiglipSlicesConfig(),
            "decoder": decoder,
            "projector": ResamplerConfig(queries=round(layout["config.json"]["query_num"] ** 0.5)),
            "image": ImageConfig(tile_size=SiglipSlicesConfig().image_size, aspect_ratio="slices", unpad=False),
            "vision_feature_layer": 27,
        }
        | changes
    )


def layouts() -> dict:
    found = [document for _, document in documents("minicpm_v") if "names_and_shapes" in document]
    if not found:
        pytest.skip("no recorded checkpoint layout of 'minicpm_v'")
    return found[0]


def count(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_parameters_of_the_published_checkpoint():
    """All but the positions of the queries, which are a constant here; a vector for the ends of rows is ours alone."""
    layout, model = layouts(), abstract_model(released())
    shapes = layout["names_and_shapes"]
    for part, prefix in ((model.encoder, "vpm."), (model.projector, "resampler."), (model.decoder, "llm.")):
        theirs = sum(
            math.prod(shape)
            for name, shape in shapes.items()
            if name.startswith(prefix) and name != "resampler.pos_embed"
        )
        assert count(part) == theirs
    constant, newline = math.prod(shapes["resampler.pos_embed"]), count(model.image_newline)
    assert count(model) - newline + constant == layout["parameters"]


def test_parameters_of_vision_remember():
    config = released(refusion=VisionRememberConfig(levels=(8, 17, 26)))
    blocks = abstract_model(config).refusion.blocks
    inner, width = 3 * 1152, 2304
    attention = 4 * (inner**2 + inner) + 4 * (width**2 + width)
    expected = attention + 2 * inner * width + inner + width + 2 * (2 * width + inner)
    assert [count(block) for block in blocks] == [expected] * 2
    assert expected == pytest.approx(85e6, abs=0.5e6)
