"""LLaVA-1.5 and LLaVA-NeXT through files: saved by transformers, imported, asked; exported, loaded by transformers."""

from __future__ import annotations

import dataclasses
import io
import json

import jax
import numpy as np
import pytest

from tests.convert.llava_folder import SIDE, Case, Reference, images, write_folder
from tests.tiny import quick
from vr_jax.convert import export_checkpoint, import_checkpoint
from vr_jax.data.collate import collate
from vr_jax.inference.loading import load_for_inference
from vr_jax.inference.prompts import question
from vr_jax.model.batch import NO_CELL, BatchShape
from vr_jax.model_directory import read_config

NEW_TOKENS = 16
CASES = {
    "llava, clip, llama": Case("Llava", "clip", "llama"),
    "llava, clip, mistral": Case("Llava", "clip", "mistral"),
    "llava, clip, qwen2": Case("Llava", "clip", "qwen2"),
    "llava, clip, llama, padded": Case("Llava", "clip", "llama", "pad"),
    "llava, siglip, qwen3": Case("Llava", "siglip", "qwen3", "square"),
    "next, clip, llama": Case("LlavaNext", "clip", "llama"),
    "next, clip, mistral": Case("LlavaNext", "clip", "mistral"),
    "next, clip, qwen2": Case("LlavaNext", "clip", "qwen2"),
}
TEMPLATES = {"llama": "tokenizer", "mistral": "tokenizer", "qwen2": "qwen_1_5", "qwen3": "qwen_1_5"}
QUESTIONS = {
    "wide": ("What is this?", ((61, 30),)),
    "tall": ("Which colour is it? Be brief.", ((25, 47),)),
    "small": ("And now?", ((9, 11),)),
    "none": ("Describe this image.", ()),
}


def encoded(sizes) -> list[bytes]:
    found = []
    for image in images(sizes):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        found.append(buffer.getvalue())
    return found


def our_answers(loaded):
    """Examples, logits and greedy tokens of every question, as one right-aligned batch."""
    model, processor = loaded.model, loaded.processor
    examples = [
        processor.prompt(question(text, encoded(sizes), processor.encoder.separators))
        for text, sizes in QUESTIONS.values()
    ]
    length, tiles = max(len(e.tokens) for e in examples), max(1, *(len(e.tile_image) for e in examples))
    shape = BatchShape(rows=len(examples), tokens=length, tiles=tiles, tile_size=SIDE)
    batch = collate([[e] for e in examples], shape, pad_side="left", optional=model.config.batch_fields).batch

    @jax.jit
    def prefill(model, batch):
        hidden, cache = model(batch, cache=model.init_cache(shape.rows, length + NEW_TOKENS))
        return model.logits(hidden), cache

    @jax.jit
    def step(model, tokens, positions, cache):
        hidden, cache = model.decode(tokens[:, None], positions[:, None], cache)
        return model.logits(hidden[:, 0]), cache

    logits, cache = prefill(model, batch)
    logits = np.asarray(logits)
    greedy = [logits[:, -1].argmax(-1).astype(np.int32)]
    for i in range(1, NEW_TOKENS):
        following, cache = step(model, greedy[-1], batch.positions[:, -1] + i, cache)
        greedy.append(np.asarray(following).argmax(-1).astype(np.int32))
    return {
        name: (e, logits[row, length - len(e.tokens) :], [int(tokens[row]) for tokens in greedy])
        for row, (name, e) in enumerate(zip(QUESTIONS, examples, strict=True))
    }


# One case is enough to see most faults; the others compile two programs each.
@pytest.fixture(scope="module", params=quick(CASES, "llava, clip, llama"))
def folders(request, tmp_path_factory):
    """The case, and its folders: transformers', the imported and the exported one."""
    directory, case = tmp_path_factory.mktemp("llava"), CASES[request.param]
    write_folder(directory / "hf", case)
    import_checkpoint(directory / "hf", directory / "ours", report=lambda line: None)
    export_checkpoint(directory / "ours", directory / "out", report=lambda line: None)
    return case, directory


def test_pixels_ids_logits_and_greedy_tokens(folders):
    case, directory = folders
    config = read_config(directory / "ours")
    assert config.template == TEMPLATES[case.decoder]
    assert (config.encoder.name, config.vision_feature_layer, config.encoder.num_layers) == (case.vision, 3, 4)
    assert config.image.aspect_ratio == (case.images if case.kind == "Llava" else "anyres")
    found, reference = our_answers(load_for_inference(directory / "ours")), Reference(directory / "hf")
    replies = set()
    scale, shift = (np.asarray(one, np.float32) for one in (config.image.pixel_scale, config.image.pixel_shift))
    for name, (text, sizes) in QUESTIONS.items():
        expected = reference.answer(text, sizes, NEW_TOKENS)
        example, logits, greedy = found[name]
        tokens = np.where(example.vision_cell == NO_CELL, example.tokens, config.image_token_id)
        np.testing.assert_array_equal(tokens, expected.ids)
        if sizes:
            pixels = (example.tile_pixels * scale - shift).transpose(0, 3, 1, 2)
            # One step of a pixel is 0.0146, and both sides round to float32.
            np.testing.assert_allclose(pixels, expected.pixels, rtol=0, atol=1e-5)
        assert np.abs(logits - expected.logits).max() <= 2e-4
        assert greedy == expected.greedy
        replies.add(tuple(greedy))
    assert len(replies) > 2


def test_transformers_asks_the_export_the_same(folders):
    case, directory = folders
    written, read = Reference(directory / "out"), Reference(directory / "hf")
    values = json.loads((directory / "out" / "config.json").read_text())
    family = {"mistral": "llama"}.get(case.decoder, case.decoder)  # which compute the same
    assert values["architectures"] == [f"{case.kind}ForConditionalGeneration"]
    assert values["text_config"]["model_type"] == family
    for text, sizes in QUESTIONS.values():
        expected, found = read.answer(text, sizes, 2), written.answer(text, sizes, 2)
        assert found.ids == expected.ids
        if sizes:
            np.testing.assert_array_equal(found.pixels, expected.pixels)
        np.testing.assert_allclose(found.logits, expected.logits, rtol=0, atol=1e-6)


def test_what_is_exported_is_imported_again(folders):
    _, directory = folders
    import_checkpoint(directory / "out", directory / "again", report=lambda line: None)
    first, again = read_config(directory / "ours"), read_config(directory / "again")
    assert again == dataclasses.replace(first, image_token_id=again.image_token_id)
