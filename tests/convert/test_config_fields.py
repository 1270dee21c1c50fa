"""The lists of fields know all of transformers' fields, and what they call without meaning changes no output."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

from tests.convert.conftest import PINPOINTS, TEXT, VISION, torch, transformers
from tests.torch_weights import randomize
from vr_jax.convert import config_fields, decoder_fields, encoder_fields, qwen2_5_vl_fields
from vr_jax.convert.configs import LLAVA_1_5
from vr_jax.convert.preprocessing import IMAGE_PROCESSOR_TABLE
from vr_jax.errors import UserError
from vr_jax.model_directory import GENERATION_TABLE, FieldTable

TABLES = {
    "Qwen2Config": decoder_fields.QWEN2_FIELDS,
    "Qwen3Config": decoder_fields.QWEN3_FIELDS,
    "LlamaConfig": decoder_fields.LLAMA_FIELDS,
    "MistralConfig": decoder_fields.MISTRAL_FIELDS,
    "SiglipVisionConfig": encoder_fields.SIGLIP_FIELDS,
    "SiglipConfig": encoder_fields.SIGLIP_WHOLE_FIELDS,
    "CLIPVisionConfig": encoder_fields.CLIP_FIELDS,
    "CLIPConfig": encoder_fields.CLIP_WHOLE_FIELDS,
    "LlavaOnevisionConfig": config_fields.ONEVISION_FIELDS,
    "LlavaNextConfig": config_fields.NEXT_FIELDS,
    f"{LLAVA_1_5.name}Config": config_fields.LLAVA_1_5_FIELDS,
    "Qwen2_5_VLConfig": qwen2_5_vl_fields.NESTED_FIELDS,
    "Qwen2_5_VLTextConfig": qwen2_5_vl_fields.TEXT_FIELDS,
    "Qwen2_5_VLVisionConfig": qwen2_5_vl_fields.VISION_FIELDS,
}
# A value that differs from the default, for fields without meaning whose default says nothing of their type.
UNUSUAL = {
    "temperature": 0.3,
    "top_k": 3,
    "top_p": 0.2,
    "min_p": 0.3,
    "top_h": 0.4,
    "typical_p": 0.5,
    "epsilon_cutoff": 0.1,
    "eta_cutoff": 0.1,
    "length_penalty": 2.0,
    "early_stopping": True,
    "cache_implementation": "static",
    "max_cache_len": 64,
    "max_length": 5,
    "pad_token_id": 3,
    "bos_token_id": 4,
    "decoder_start_token_id": 5,
    "num_assistant_tokens": 3,
    "assistant_confidence_threshold": 0.9,
    "assistant_lookbehind": 3,
    "target_lookbehind": 3,
    "max_matching_ngram_size": 3,
    "transformers_version": "4.0.0",
    "max_window_size": 24,
    "chat_format": "chatml",
}
# These cannot be set alone, or only together with a model that assists.
NOT_TRIED = {
    "cache_config", "compile_config", "continuous_batching_config", "speculation_type", "assistant_ensemble_weight",
    "num_assistant_tokens_schedule", "is_assistant", "_from_model_config", "_commit_hash", "low_memory",
    "diversity_penalty", "return_legacy_cache", "prefill_chunk_size", "output_attentions",
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_every_field_of_a_config_class_is_known(name):
    config_class = getattr(transformers, name)
    known = {field.name for field in dataclasses.fields(config_class) if not field.name.startswith("_")}
    assert known - set(TABLES[name].known) == set()
    # What transformers writes for a default config of the class is accepted.
    values = config_class().to_dict()
    TABLES[name].check(values, name)


def test_every_field_of_generation_and_image_processor_is_known():
    assert set(transformers.GenerationConfig().to_dict()) - set(GENERATION_TABLE.known) == set()
    GENERATION_TABLE.check(transformers.GenerationConfig().to_dict(), "generation")
    from transformers.processing_utils import ImagesKwargs

    assert set(ImagesKwargs.__annotations__) - set(IMAGE_PROCESSOR_TABLE.known) == set()


def test_every_reason_is_a_sentence():
    for table in (*TABLES.values(), *config_fields.LLAVA_FIELDS.values(), GENERATION_TABLE, IMAGE_PROCESSOR_TABLE):
        assert all(reason.endswith(".") and " " in reason for reason in table.without_meaning.values())
        assert not table.honoured & (set(table.fixed) | set(table.without_meaning))


@pytest.fixture(scope="module")
def decoder():
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TEXT)).eval()
    randomize(model)
    return model


def replied(model, **settings) -> list[int]:
    """Greedy tokens under a generation_config.json."""
    model.generation_config = transformers.GenerationConfig(**settings)
    ids = torch.tensor([[5, 9, 2, 30]])
    with torch.no_grad():
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    return getattr(output, "sequences", output)[0].tolist()


def unusual(name: str):
    """A value of a generation field that is not its default."""
    default = getattr(transformers.GenerationConfig(), name, None)
    value = UNUSUAL.get(name, not default)
    assert value != default
    return value


TRIED = [name for name in GENERATION_TABLE.without_meaning if name not in NOT_TRIED]
# Those that concern the cache are tried one at a time only.
TOGETHER = [name for name in TRIED if "cache" not in name and name != "disable_compile"]


def test_greedy_tokens_do_not_depend_on_generation_fields_without_meaning(decoder):
    assert replied(decoder, **{name: unusual(name) for name in TOGETHER}) == replied(decoder)


@pytest.mark.slow  # One after another.
@pytest.mark.parametrize("name", TRIED)
def test_greedy_tokens_do_not_depend_on_a_generation_field_without_meaning(name, decoder):
    assert replied(decoder, **{name: unusual(name)}) == replied(decoder)


CONFIG_VALUES = {
    **{"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}, "problem_type": "regression"},
    **{"transformers_version": "4.0.0", "torch_dtype": "bfloat16", "dtype": "bfloat16", "num_labels": 2},
    **{"initializer_range": 3.0, "attention_dropout": 0.5, "chunk_size_feed_forward": 2},
    **{"attn_implementation": "eager", "experts_implementation": "eager", "tokenizer_class": "T"},
    **{"max_new_tokens": 3, "prefix": "x", "auto_map": {"AutoModel": "m.M"}, "task_specific_params": {"a": 1}},
}
CONFIG_FIELDS = [
    name
    for name in decoder_fields.QWEN2_FIELDS.without_meaning
    if name not in GENERATION_TABLE.without_meaning and not name.startswith("_")
]


def check_logits(decoder, names) -> None:
    config = transformers.Qwen2Config(**TEXT | {name: CONFIG_VALUES.get(name, 3) for name in names})
    model = transformers.Qwen2ForCausalLM(config).eval()
    randomize(model)
    ids = torch.tensor([[5, 9, 2, 30]])
    with torch.no_grad():
        found, expected = (one(ids, return_dict=True).logits.numpy() for one in (model, decoder))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_logits_do_not_depend_on_config_fields_without_meaning(decoder):
    check_logits(decoder, CONFIG_FIELDS)


@pytest.mark.slow  # One after another.
@pytest.mark.parametrize("name", CONFIG_FIELDS)
def test_logits_do_not_depend_on_a_config_field_without_meaning(name, decoder):
    check_logits(decoder, [name])


@pytest.mark.parametrize("name", sorted(IMAGE_PROCESSOR_TABLE.without_meaning))
def test_pixels_do_not_depend_on_processor_fields_without_meaning(name):
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    side = VISION["image_size"]
    common = {"size": {"height": side, "width": side}, "image_grid_pinpoints": PINPOINTS}
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8))
    values = {"do_pad": False, "device": "cpu", "return_tensors": "np", "processor_class": "P", "size_divisor": 32}
    value = values.get(name, True)
    expected, found = (
        LlavaOnevisionImageProcessorPil.from_dict(one)([image], return_tensors="np")["pixel_values"]
        for one in (common, common | {name: value})
    )
    np.testing.assert_array_equal(found, expected)


def test_an_unknown_field_is_refused_unless_it_switches_nothing_on():
    table = FieldTable(honoured=frozenset(("size",)), fixed={"mode": ("a", "b")}, without_meaning={"note": "A note."})
    table.check({"size": 3, "mode": "b", "note": object(), "other": None, "more": False, "list": []}, "file")
    for values, message in (
        ({"mode": "c"}, "file: mode = 'c' is not supported, expected 'a' or 'b'; leave it out with `--ignore=mode`"),
        ({"sise": 1}, "file: the field 'sise' = 1 is not known; did you mean 'size'"),
        ({"other": {"x": 1}}, "file: the field 'other' = .* is not known"),
        ({"mode": 1}, "mode = 1 is not supported"),
    ):
        with pytest.raises(UserError, match=message):
            table.check(values, "file")
