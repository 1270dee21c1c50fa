"""DeepStack and SVA against the recorded outputs of the official code."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import torch_weights
from tests.golden.discovery import Case, cases
from vr_jax.convert.method_tables import DEEPSTACK, SVA
from vr_jax.convert.tables import TEXT
from vr_jax.model.batch import NEWLINE, NO_CELL
from vr_jax.model.config import VlmConfig, single_tile
from vr_jax.model.decoders.stages import DecoderInputs, StageHook
from vr_jax.model.decoders.transformer import Decoder, TransformerConfig
from vr_jax.model.encoders.siglip import SiglipConfig
from vr_jax.model.projectors.pool import PoolConfig
from vr_jax.model.refusion import deepstack, sva
from vr_jax.model.refusion.context import VisionContext
from vr_jax.model.registry import RefusionConfig
from vr_jax.model.windows import to_windows

KINDS = ("sva_layer", "sva_full", "merger", "deepstack_llm")


def of_kind(kind: str) -> list:
    found = cases("refusion", known=KINDS)
    return [p for p in found if p.values[0] is None or p.values[0].kind not in KINDS or p.values[0].kind == kind]


def model_config(
    refusion: RefusionConfig, *, hidden_size: int, width: int = 8, stride: int = 1, side: int = 1, **text
) -> VlmConfig:
    """A model around a re-fusion block: encoder of the given width, `side` cells of `stride` patches a side."""
    text = {"num_layers": 5, "num_heads": 1, "num_kv_heads": 1, "vocab_size": 1, "intermediate_size": 1} | text
    return VlmConfig(
        encoder=SiglipConfig(
            hidden_size=width, num_heads=1, num_layers=4, image_size=side * stride, patch_size=1, intermediate_size=1
        ),
        decoder=TransformerConfig(hidden_size=hidden_size, **text),
        projector=PoolConfig(stride=stride),
        refusion=refusion,
        image=single_tile(side * stride),
        vision_feature_layer=0,
    )


def sampler(weights, *, hidden_size: int, width: int, stride: int, depth: int = 1) -> sva.Block:
    """A VisionTokenSampler with official weights `layers.*`."""
    config = sva.SvaConfig(levels=(0,), width=width, depth=depth)
    model = model_config(config, hidden_size=hidden_size, stride=stride)
    block = nnx.eval_shape(lambda: sva.Block(config, model.spec, rngs=nnx.Rngs(0)))
    named = {f"vision_sampler_layers.0.{name}": value for name, value in weights.items()}
    return torch_weights.load(block, SVA, named, "refusion.blocks.0.")


@jax.jit
def read(block: sva.Block, query, context, windows, valid):
    """Results of the whole sampler, and inside its first layer."""
    layer = jax.tree.map(lambda x: x[0], block.layers)
    inputs = jnp.concatenate([query, layer.proj_context(context)], axis=-1)
    inside = layer.proj_in(inputs)
    attended = layer.cross_attn(inside, windows + layer.pos_embed[...], valid)
    return {
        "proj_in": inside,
        "cross_attn": attended,
        "norm": layer.norm(inside + attended),
        "y": block.read(query, context, windows, valid),
    }


@pytest.mark.parametrize("case", of_kind("sva_layer"))
def test_sva_layer(case: Case):
    c = case.config
    block = sampler(case.weights, hidden_size=c["q_dim"], width=c["C"], stride=c["s"], depth=c["depth"])
    x = case.inputs
    # Every window is a group with a context of its own.
    found = read(block, x["queries"][:, 0][None], x["context"][:, 0][None], x["kv"][None], x["mask"][None])
    assert found.keys() == case.outputs.keys()
    for name, value in found.items():
        np.testing.assert_allclose(value[0][:, None], case.outputs[name], **case.tolerance(), err_msg=name)


def unpadded(grid: int, wide: int, high: int) -> tuple[slice, slice]:
    """Rows and columns of a square grid that an image of wide x high, centred on it, fills (LLaVA's unpad)."""
    if wide > high:
        crop = (grid - int(high * (grid / wide))) // 2
        return slice(crop, grid - crop), slice(grid)
    crop = (grid - int(wide * (grid / high))) // 2
    return slice(grid), slice(crop, grid - crop)


@pytest.mark.parametrize("case", of_kind("sva_full"))
def test_sva_from_features_to_the_last_layer(case: Case):
    """The whole of Cambrian with one encoder: auxiliary projection, connector, in-LLM samplers at the kept tokens."""
    c, weights, out = case.config, case.weights, case.outputs
    grid, side, width = c["grid"], c["n"], c["C"]
    stride = grid // side
    insert_after = tuple(1 + c["start"] + c["stride"] * k for k in range(c["samplers"]))
    config = sva.SvaConfig(levels=(0,), width=width, insert_after=insert_after)
    model = model_config(config, hidden_size=c["D"], width=c["Dv"], stride=stride, side=side, num_layers=c["layers"])
    prepare = nnx.eval_shape(lambda: sva.Features(config, model.spec, rngs=nnx.Rngs(0)))
    aux = {name: value for name, value in weights.items() if name.startswith("mm_projector_aux_0")}
    prepare = torch_weights.load(prepare, SVA, aux, "refusion.features.")
    features = jax.jit(prepare)((to_windows(case.inputs["features"], stride)[:, None],))

    images = len(c["image_sizes_wh"])
    shown = np.zeros((images, grid, grid), bool)
    cells = np.arange(side * side).reshape(side, side)
    kept = []
    for image, (wide, high) in enumerate(c["image_sizes_wh"]):
        shown[image][unpadded(grid, wide, high)] = True
        kept.append(cells[unpadded(side, wide, high)])
    assert [list(k.shape) for k in kept] == out["final_size_hw"].tolist()
    valid = to_windows(shown.reshape(images, -1, 1), stride)[:, None, ..., 0]
    valid = valid | ~valid.any(axis=-1, keepdims=True)

    def chosen(x):
        return np.concatenate([np.asarray(x)[i, k.reshape(-1)] for i, k in enumerate(kept)])

    tolerance = case.tolerance()
    np.testing.assert_allclose(chosen(features.windows[:, 0]), out["aux_windows"], **tolerance)
    np.testing.assert_array_equal(chosen(valid[:, 0]), out["aux_window_mask"])
    context = np.broadcast_to(features.context, (images, side * side, width))
    np.testing.assert_allclose(chosen(context)[:, None], out["global_context"], **tolerance)

    embedded = embed(case, features, valid, kept)
    np.testing.assert_allclose(embedded[0], out["inputs_embeds"], **tolerance)

    blocks = [
        sampler(
            torch_weights.under(weights, f"vision_sampler_layers.{i}."), hidden_size=c["D"], width=width, stride=stride
        )
        for i in range(c["samplers"])
    ]
    vision = VisionContext(
        features=features._replace(valid=jnp.asarray(valid)),
        vision_cell=jnp.asarray(embedded[1]),
        segment_ids=jnp.ones_like(embedded[1]),
        text_token_mask=jnp.zeros(embedded[1].shape, bool),
        tile_segment=jnp.ones((images, 1), jnp.int32),
        tile_image=jnp.ones((images, 1), jnp.int32),
        cells_per_tile=side * side,
    )
    positions = jnp.broadcast_to(jnp.arange(embedded[0].shape[1]), embedded[0].shape[:2])
    inputs = DecoderInputs(hidden=jnp.asarray(embedded[0]), positions=positions, segment_ids=vision.segment_ids)
    run = jax.jit(lambda block, inputs, vision: block(inputs, vision))
    for layer in range(c["layers"]):
        kernel, bias = (weights[f"layers.{layer}.{name}"] for name in ("weight", "bias"))
        inputs = inputs.replace(hidden=inputs.hidden + jnp.tanh(inputs.hidden @ kernel.T + bias))
        if layer + 1 in insert_after:
            before, inputs = inputs, run(blocks[insert_after.index(layer + 1)], inputs, vision)
            changed = (np.asarray(before.hidden) != np.asarray(inputs.hidden)).any(axis=-1)
            np.testing.assert_array_equal(changed, np.asarray(vision.is_vision))
        name = f"hidden_before_layer{layer + 1}" if layer + 1 < c["layers"] else "hidden_final"
        real = embedded[2]
        np.testing.assert_allclose(np.asarray(inputs.hidden)[real], out[name][real], **tolerance, err_msg=name)


def embed(case: Case, features: sva.SvaFeatures, valid, kept):
    """Input states (B, N, D), vision cells (B, N) and real positions (B, N): the connector is a sampler of a learnt
    query, followed by the usual MLP and LLaVA's splice."""
    c, weights = case.config, case.weights
    connector = sampler(
        torch_weights.under(weights, "vision_sampler_0."),
        hidden_size=c["C"],
        width=c["C"],
        stride=c["grid"] // c["n"],
        depth=c["connector_depth"],
    )
    query = np.broadcast_to(weights["vision_query"], (len(valid), c["n"] ** 2, c["C"]))
    read = jax.jit(connector.read)(query, features.context, features.windows[:, 0], valid[:, 0])
    first, second = ((weights[f"mm_projector.{i}.weight"].T, weights[f"mm_projector.{i}.bias"]) for i in (0, 2))
    tokens = np.asarray(jax.nn.gelu(read @ first[0] + first[1], approximate=False) @ second[0] + second[1])
    rows, cells = [], []
    for number, cell in enumerate(kept):
        layout = np.concatenate([cell, np.full((len(cell), 1), NEWLINE)], axis=1).reshape(-1)
        image = np.where((layout >= 0)[:, None], tokens[number][np.maximum(layout, 0)], weights["image_newline"])
        at = c["image_position"]
        ids = case.inputs["input_ids"][number]
        text = weights["embed_tokens.weight"][np.maximum(ids, 0)]
        rows.append(np.concatenate([text[:at], image, text[at + 1 :]]))
        cells.append(np.concatenate([np.full(at, NO_CELL), layout, np.full(len(ids) - at - 1, NO_CELL)]))
    length = max(len(row) for row in rows)
    hidden = np.zeros((len(rows), length, c["D"]), np.float32)
    vision_cell = np.full((len(rows), length), NO_CELL, np.int32)
    real = np.zeros((len(rows), length), bool)
    for i, (row, cell) in enumerate(zip(rows, cells, strict=True)):
        hidden[i, : len(row)], vision_cell[i, : len(row)], real[i, : len(row)] = row, cell, True
    return hidden, vision_cell, real


@pytest.mark.parametrize("case", of_kind("merger"))
def test_patch_merger(case: Case):
    c = case.config
    merger = nnx.eval_shape(
        lambda: deepstack.PatchMerger(
            c["Dv"], c["s"] ** 2, c["Dt"], norm_per_patch=not c["postshuffle"], dtype=jnp.float32, rngs=nnx.Rngs(0)
        )
    )
    named = {f"deepstack_merger_list.0.{name}": value for name, value in case.weights.items()}
    merger = torch_weights.load(merger, DEEPSTACK, named, "refusion.blocks.0.merger.")
    raster = case.inputs["x_raster"]
    windows = to_windows(raster.reshape(raster.shape[0], -1, c["Dv"]), c["s"])
    np.testing.assert_array_equal(windows.reshape(-1, c["Dv"]), case.outputs["x_window_order"])
    np.testing.assert_allclose(jax.jit(merger)(windows), case.outputs["y"], **case.tolerance())


class Merged(nnx.Module):
    """Stands where a merger does and takes features that are merged already: windows of one patch."""

    def __call__(self, windows):
        return windows[..., 0, :]


@pytest.mark.parametrize("case", of_kind("deepstack_llm"))
def test_deepstack_in_the_decoder(case: Case):
    c, q = case.config, case.config["qwen"]
    levels = c["levels"]
    config = deepstack.DeepStackConfig(insert_after=tuple(range(1, levels + 1)), levels=tuple(range(levels)))
    model = model_config(
        config,
        hidden_size=q["hidden_size"],
        num_layers=q["num_hidden_layers"],
        num_heads=q["num_attention_heads"],
        num_kv_heads=q["num_key_value_heads"],
        intermediate_size=q["intermediate_size"],
        vocab_size=q["vocab_size"],
        rope_theta=q["rope_theta"],
        rms_norm_eps=q["rms_norm_eps"],
    )
    decoder = nnx.eval_shape(
        lambda: Decoder(
            model.decoder,
            bounds=model.decoder_bounds,
            attention_backend="xla",
            dtype=jnp.float32,
            rngs=nnx.Rngs(0),
        )
    )
    weights = torch_weights.under(case.weights, "model.")
    decoder = torch_weights.load(decoder, TEXT, weights, "decoder.")
    mask, features = case.inputs["visual_mask"], case.inputs["deepstack"]
    cell = np.where(mask, np.cumsum(mask, axis=1) - 1, NO_CELL).astype(np.int32)
    ones = jnp.ones(cell.shape, jnp.int32)
    vision = VisionContext(
        features=tuple(jnp.asarray(level)[None, None, :, None] for level in features),
        vision_cell=jnp.asarray(cell),
        segment_ids=ones,
        text_token_mask=jnp.zeros(cell.shape, bool),
        tile_segment=jnp.ones((1, 1), jnp.int32),
        tile_image=jnp.ones((1, 1), jnp.int32),
        cells_per_tile=features.shape[1],
    )
    blocks = [deepstack.Block(config, model.spec, i, rngs=nnx.Rngs(0)) for i in range(levels)]
    for block in blocks:
        block.merger = Merged()

    @jax.jit
    def run(decoder, inputs, vision):
        found = []

        def apply(k, inputs, state):
            if 0 < k <= levels:
                inputs = blocks[k - 1](inputs, vision)
                found.append(inputs.hidden)
            return inputs, state

        return decoder(inputs, None, StageHook(apply, None))[0], found

    positions = jnp.arange(cell.shape[1])[None]
    inputs = DecoderInputs(hidden=jnp.asarray(case.inputs["inputs_embeds"]), positions=positions, segment_ids=ones)
    hidden, found = run(decoder, inputs, vision)
    assert len(found) == levels
    for layer, states in enumerate(found):
        np.testing.assert_allclose(states, case.outputs[f"hidden_after_{layer}"], **case.tolerance())
    logits = np.asarray(hidden) @ weights["embed_tokens.weight"].T
    np.testing.assert_allclose(logits, case.outputs["logits"], **case.tolerance("deepstack_llm logits"))
