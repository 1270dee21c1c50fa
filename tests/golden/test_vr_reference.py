"""Vision Remember against recorded outputs of an independent torch implementation of the same formulas."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import torch_weights
from tests.golden.discovery import Case, cases
from tests.tiny import quick
from vr_jax.convert.tables import HEAD, TEXT, VISION_REMEMBER
from vr_jax.model.batch import NEWLINE, NO_CELL
from vr_jax.model.config import VlmConfig, single_tile
from vr_jax.model.decoders.stages import DecoderInputs, StageHook
from vr_jax.model.decoders.transformer import Decoder, TransformerConfig
from vr_jax.model.encoders.siglip import SiglipConfig
from vr_jax.model.projectors.pool import PoolConfig
from vr_jax.model.refusion.context import VisionContext
from vr_jax.model.refusion.vision_remember import Block, Features, VisionRememberConfig
from vr_jax.model.windows import to_windows

VISION_KIND, NEWLINE_KIND = 2, 3  # in.kind; 0 is padding, 1 text
ORDERS = {"ca_sa": "cross_self", "sa_ca": "self_cross"}


def of_kind(kind: str) -> list:
    # The blocks' cases have rows without text too.
    found = cases("vr_reference", known=("block", "llm"), slow=("llm_no_text",))
    return [
        p for p in found if p.values[0] is None or p.values[0].kind not in ("block", "llm") or p.values[0].kind == kind
    ]


def model_config(case: Case, cross_attention: str) -> VlmConfig:
    c = case.config
    qwen = c.get("qwen", {"hidden_size": c["Dt"], "num_attention_heads": c["heads_self"], "num_hidden_layers": 2})
    layers = c.get("after_layers", [0])
    return VlmConfig(
        encoder=SiglipConfig(
            hidden_size=c["Dv"], num_heads=1, num_layers=c["levels"], image_size=c["n"] * c["s"], patch_size=1
        ),
        decoder=TransformerConfig(
            vocab_size=qwen.get("vocab_size", 1),
            hidden_size=qwen["hidden_size"],
            intermediate_size=qwen.get("intermediate_size", 1),
            num_layers=qwen["num_hidden_layers"],
            num_heads=qwen["num_attention_heads"],
            num_kv_heads=qwen.get("num_key_value_heads", qwen["num_attention_heads"]),
            rope_theta=qwen.get("rope_theta", 1e6),
            rms_norm_eps=qwen.get("rms_norm_eps", 1e-6),
            tie_word_embeddings=qwen.get("tie_word_embeddings", True),
        ),
        projector=PoolConfig(stride=c["s"]),
        refusion=VisionRememberConfig(
            insert_after=tuple(layer + 1 for layer in layers),
            levels=tuple(range(c["levels"])),
            interaction=c.get("interaction", "local"),
            cross_attention=cross_attention,
            cross_heads=c["heads_cross"],
            self_heads=c["heads_self"],
            self_attention=not c.get("no_self", False),
            order=ORDERS[c.get("order", "ca_sa")],
            self_scope=c.get("sa_scope", "image"),
        ),
        image=single_tile(c["n"] * c["s"]),
        vision_feature_layer=0,
    )


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A case's inputs as our types, one sample per row."""

    config: VlmConfig
    inputs: DecoderInputs
    vision: VisionContext


def recorded(case: Case, cross_attention: str) -> Recorded:
    config = model_config(case, cross_attention)
    kind, index, features = (case.inputs[name] for name in ("kind", "vision_index", "features"))
    rows, length = kind.shape
    # Tiles of a row: from its first one to the first one of the next row that has any.
    first = [
        int(index[b, :, 1][kind[b] == VISION_KIND].min()) if (kind[b] == VISION_KIND).any() else None
        for b in range(rows)
    ]
    stops = [next((f for f in first[b + 1 :] if f is not None), features.shape[1]) for b in range(rows)]
    slots = max(stop - start for start, stop in zip(first, stops, strict=True) if start is not None)
    cells, patches = config.cells_per_tile, config.projector.stride**2
    levels = np.zeros((features.shape[0], rows, slots, cells, patches, features.shape[-1]), np.float32)
    tile_image = np.zeros((rows, slots), np.int32)
    vision_cell = np.full((rows, length), NO_CELL, np.int32)
    windows = to_windows(features.reshape(*features.shape[:2], -1, features.shape[-1]), config.projector.stride)
    for b, (start, stop) in enumerate(zip(first, stops, strict=True)):
        vision_cell[b, kind[b] == NEWLINE_KIND] = NEWLINE
        if start is None:
            continue
        levels[:, b, : stop - start] = windows[:, start:stop]
        image, tile, row, column = index[b, kind[b] == VISION_KIND].T
        vision_cell[b, kind[b] == VISION_KIND] = (tile - start) * cells + row * config.cells_per_side + column
        for t in range(start, stop):  # a tile that unpad cropped away belongs to the image before it
            tile_image[b, t - start] = 1 + image[tile <= t].max() - image.min()
    segments = (kind > 0).astype(np.int32)
    features = jax.jit(Features(config.refusion))(tuple(levels))
    vision = VisionContext(
        features=features,
        vision_cell=jnp.asarray(vision_cell),
        segment_ids=jnp.asarray(segments),
        text_token_mask=jnp.asarray(case.inputs["text_select"]),
        tile_segment=jnp.asarray((tile_image > 0).astype(np.int32)),
        tile_image=jnp.asarray(tile_image),
        cells_per_tile=cells,
    )
    inputs = DecoderInputs(
        hidden=jnp.asarray(case.inputs["hidden"]),
        positions=jnp.asarray(np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))),
        segment_ids=jnp.asarray(segments),
    )
    return Recorded(config, inputs, vision)


def one_row(data: Recorded) -> Recorded:
    """All samples packed into one row: segments, tiles, cells and images are numbered on."""
    v = data.vision
    rows, slots = v.tile_image.shape
    number = np.arange(rows, dtype=np.int32)[:, None]
    cells = data.config.cells_per_tile * slots

    def join(x):
        x = np.asarray(x)
        return x.reshape(1, -1, *x.shape[2:])

    segments = join(np.where(v.segment_ids > 0, number + 1, 0))
    vision = VisionContext(
        features=join(v.features),
        vision_cell=join(np.where(v.vision_cell >= 0, v.vision_cell + number * cells, v.vision_cell)),
        segment_ids=segments,
        text_token_mask=join(v.text_token_mask),
        tile_segment=join(np.where(v.tile_segment > 0, number + 1, 0)),
        tile_image=join(np.where(v.tile_image > 0, v.tile_image + number * slots, 0)),
        cells_per_tile=v.cells_per_tile,
    )
    inputs = DecoderInputs(hidden=join(data.inputs.hidden), positions=join(data.inputs.positions), segment_ids=segments)
    return Recorded(data.config, inputs, vision)


def block_of(config: VlmConfig, weights: dict[str, np.ndarray]) -> Block:
    assert config.refusion is not None
    if not config.refusion.self_attention:  # recorded, and of no effect
        weights = {name: value for name, value in weights.items() if not name.startswith(("ln_s", "self_attn"))}
    block = nnx.eval_shape(lambda: Block(config.refusion, config.spec, rngs=nnx.Rngs(0)))
    named = {f"0.{name}": value for name, value in weights.items()}
    return torch_weights.load(block, VISION_REMEMBER, named, "refusion.blocks.0.")


@jax.jit
def run_block(block: Block, inputs: DecoderInputs, vision: VisionContext):
    """The block's result, its text-guided tokens, and each sub-layer by itself."""
    text_token, exists = block._text_token(inputs.hidden, vision)  # noqa: SLF001  # only this part is compared
    cross = block.cross(inputs.hidden, vision)
    bidirectional = block.bidirectional(inputs.hidden, inputs, vision, text_token, exists)
    return block(inputs, vision).hidden, text_token, exists, cross, bidirectional


@pytest.mark.parametrize("cross_attention", quick(["absorbed", "plain"], "absorbed"))
@pytest.mark.parametrize("case", of_kind("block"))
def test_block(case: Case, cross_attention: str):
    data = recorded(case, cross_attention)
    block = block_of(data.config, case.weights)
    results = run_block(block, data.inputs, data.vision)
    hidden, text_token, exists, after_cross, after_self = (np.asarray(x) for x in results)
    np.testing.assert_allclose(hidden, case.outputs["hidden"], **case.tolerance())

    is_vision = case.inputs["kind"] == VISION_KIND
    np.testing.assert_array_equal(hidden[~is_vision], case.inputs["hidden"][~is_vision])
    for b in np.flatnonzero(is_vision.any(axis=1)):
        assert exists[b, 0] == case.inputs["text_select"][b].any()
        np.testing.assert_array_equal(text_token[b, 0], case.outputs["t"][b])
    for name, found in {"after_cross": after_cross, "after_self": after_self}.items():
        if name in case.outputs:
            np.testing.assert_allclose(found[is_vision], case.outputs[name], **case.tolerance())


@pytest.mark.slow  # test_packing.py packs samples with the whole model.
@pytest.mark.parametrize("case", of_kind("block"))
def test_samples_packed_into_one_row(case: Case):
    data = one_row(recorded(case, "absorbed"))
    hidden = run_block(block_of(data.config, case.weights), data.inputs, data.vision)[0]
    np.testing.assert_allclose(hidden.reshape(case.outputs["hidden"].shape), case.outputs["hidden"], **case.tolerance())


@pytest.mark.parametrize("cross_attention", quick(["absorbed", "plain"], "absorbed"))
@pytest.mark.parametrize("case", of_kind("llm"))
def test_decoder(case: Case, cross_attention: str):
    data = recorded(case, cross_attention)
    config = data.config
    count = len(config.decoder_bounds) - 2
    weights = {name.removeprefix("llm.").removeprefix("model."): x for name, x in case.weights.items()}
    weights = {name.removeprefix("vr."): x for name, x in weights.items()}
    head = weights.get("lm_head.weight", weights["embed_tokens.weight"]).T

    blocks = [block_of(config, torch_weights.under(weights, f"{i}.")) for i in range(count)]
    abstract = nnx.eval_shape(
        lambda: Decoder(
            config.decoder,
            bounds=config.decoder_bounds,
            attention_backend="xla",
            dtype=jnp.float32,
            rngs=nnx.Rngs(0),
        )
    )
    own = {name: value for name, value in weights.items() if not name[0].isdigit()}
    decoder = torch_weights.load(abstract, TEXT + HEAD, own, "decoder.")
    steps = len(case.outputs["greedy_tokens"])
    length = data.inputs.hidden.shape[1]

    @jax.jit
    def prefill(decoder, blocks, inputs, vision):
        found = []

        def apply(k, inputs, state):
            if not 0 < k <= count:
                return inputs, state
            after = blocks[k - 1](inputs, vision)
            found.append((inputs.hidden, after.hidden))
            return after, state

        hidden, cache = decoder(inputs, decoder.init_cache(1, length + steps), StageHook(apply, None))
        return hidden, cache, found

    hidden, cache, found = prefill(decoder, blocks, data.inputs, data.vision)
    assert len(found) == count
    for i, (before, after) in enumerate(found):
        np.testing.assert_allclose(before, case.outputs[f"hidden_before_vr{i}"], **case.tolerance())
        np.testing.assert_allclose(after, case.outputs[f"hidden_after_vr{i}"], **case.tolerance())
    logits = np.asarray(hidden) @ head
    tolerance = case.tolerance("llm logits")
    np.testing.assert_allclose(logits[0], case.outputs["prefill_logits"], **tolerance)

    decode = jax.jit(lambda decoder, token, position, cache: decoder.decode(decoder.embed(token), position, cache))
    tokens, rows = [int(np.argmax(logits[0, -1]))], []
    for step in range(steps):
        hidden, cache = decode(
            decoder, np.array([[tokens[-1]]], np.int32), np.array([[length + step]], np.int32), cache
        )
        rows.append(np.asarray(hidden)[0, 0] @ head)
        tokens.append(int(np.argmax(rows[-1])))
    assert tokens[:steps] == case.outputs["greedy_tokens"].tolist()
    np.testing.assert_allclose(rows, case.outputs["decode_logits"], **tolerance)
