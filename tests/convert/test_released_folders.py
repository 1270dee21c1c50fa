"""Folders with the files of released checkpoints are read as the hub has them, or refused with what to do instead."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import tokenizers

from tests.convert.conftest import torch
from tests.convert.released_files import (
    CLIP_336,
    LLAVA_1_5,
    NEXT_MISTRAL,
    NEXT_VICUNA,
    OWN,
    PARTS,
    QWEN2_5_VL,
    WHOLE,
    Released,
)
from tests.convert.released_folder import (
    own_names,
    released_names,
    state_of,
    with_buffers,
    write_files,
    write_released,
    write_shards,
)
from tests.data.prompts.small_tokenizers import of_transformers
from tests.tiny import quick
from vr_jax.convert import encoder_configs, import_checkpoint
from vr_jax.convert.chat_template import find_template
from vr_jax.convert.importing import plan_import
from vr_jax.data.conversations import ChatEncoder
from vr_jax.data.prompts.chat_templates import ChatTemplate
from vr_jax.data.types import IMAGE, Turn
from vr_jax.errors import UserError
from vr_jax.model.encoders.clip import ClipConfig
from vr_jax.model_directory import load_params, load_tokenizer, read_config, read_generation
from vr_jax.storage import as_path

_ASK = "What is shown?"
_LLAMA_3_ASK = "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat is shown?<|eot_id|>"
# By folder: the chat format, the prompt of a question about an image, the layer that is taken of three (four), how
# images are cut, and the ids that end a reply, by their tokens.
EXPECTED = {
    "llava-hf/llava-1.5-7b-hf": ("tokenizer", "USER: <image>\nWhat is shown? ASSISTANT:", 2, "crop", ["</s>"]),
    "llava-hf/llava-v1.6-mistral-7b-hf": (
        "tokenizer",
        "[INST] <image>\nWhat is shown? [/INST]",
        2,
        "anyres",
        ["</s>"],
    ),
    "llava-hf/llava-v1.6-vicuna-7b-hf": (
        "tokenizer",
        "USER: <image>\nWhat is shown? ASSISTANT:",
        2,
        "anyres",
        ["</s>"],
    ),
    "llava-hf/llama3-llava-next-8b-hf": (
        "tokenizer",
        f"<|begin_of_text|>{_LLAMA_3_ASK}<|start_header_id|>assistant<|end_header_id|>\n\n",
        2,
        "anyres",
        ["<|end_of_text|>"],
    ),
    # Its own template cannot be used, since it begins replies otherwise than it ends prompts.
    "llava-hf/llava-interleave-qwen-0.5b-hf": ("qwen_1_5", None, 3, "square", ["<|im_end|>"]),
    "Qwen/Qwen2.5-VL-3B-Instruct": (
        "qwen2_vl",
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|>"
        "<|vision_end|>What is shown?<|im_end|>\n<|im_start|>assistant\n",
        4,
        "native",
        ["<|im_end|>", "<|endoftext|>"],
    ),
}


# By folder: the named format that comes nearest to its template, and whether a special token ends replies there.
NAMED = {
    "llava-hf/llava-1.5-7b-hf": ("vicuna_v1", False),
    "llava-hf/llava-v1.6-mistral-7b-hf": ("mistral_instruct", False),
    "llava-hf/llava-v1.6-vicuna-7b-hf": ("vicuna_v1", False),
    "llava-hf/llama3-llava-next-8b-hf": ("llama_3", True),
}


# Each of the others writes and reads one more whole folder, most of them with a vocabulary of 32064 tokens.
@pytest.mark.parametrize(
    "name", quick(WHOLE, "llava-hf/llava-1.5-7b-hf", "llava-hf/llama3-llava-next-8b-hf", "Qwen/Qwen2.5-VL-3B-Instruct")
)
def test_a_whole_model_is_read_as_it_is_released(name, tmp_path):
    made = WHOLE[name]
    source = write_released(tmp_path / "hub", made)
    lines: list[str] = []
    import_checkpoint(source, tmp_path / "ours", report=lines.append)
    template, prompt, layer, aspect, ends = EXPECTED[name]
    config, tokenizer = read_config(tmp_path / "ours"), load_tokenizer(tmp_path / "ours")
    assert (config.template, config.vision_feature_layer, config.image.aspect_ratio) == (template, layer, aspect)
    assert list(read_generation(tmp_path / "ours").eos_token_ids) == tokenizer.convert_tokens_to_ids(ends)
    image = "<|image_pad|>" if aspect == "native" else "<image>"
    assert config.image_token_id == tokenizer.convert_tokens_to_ids(image)
    params = load_params(tmp_path / "ours")
    text = made.config.get("text_config", made.config)
    assert params["decoder.embed.embedding"].shape == (text["vocab_size"], text["hidden_size"])
    assert ("decoder.lm_head.kernel" in params) is not made.config["tie_word_embeddings"]
    assert ("image_newline" in params) is (aspect == "anyres")
    if prompt is None:
        assert any("the chat template writes other prompts than the format" in line for line in lines)
        return
    found, _ = find_template(as_path(source))
    tokenizer.chat_template = found
    own = ChatEncoder(tokenizer, config.template, False, "none")
    if isinstance(own.format, ChatTemplate):
        assert (own.format.named, own.format.closes_replies) == NAMED[name]
    turns = [Turn("user", IMAGE, _ASK), Turn("assistant", "A car."), Turn("user", "Which one?")]
    for number in (1, 3):
        messages = [{"role": turn.role, "content": [_part(part) for part in turn.parts]} for turn in turns[:number]]
        written = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert number > 1 or written == prompt
        expected = of_transformers(tokenizer, written, image)
        if aspect == "native":  # The layout of the image writes the markers around it.
            around = tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>"])
            expected = expected[~np.isin(expected, around)]
        assert own.prompt(turns[:number]).tokens.tolist() == expected.tolist()


def _part(part):
    return {"type": "image"} if part is IMAGE else {"type": "text", "text": part}


def _written_by_transformers_4_53(values):
    """A config.json of Qwen2.5-VL with the decoder's fields in `text_config` and outside of it."""
    outer = {name: one for name, one in values.items() if not name.endswith("_token_id") and name != "vision_config"}
    rope = {"mrope_section": [2, 3, 3], "rope_type": "default", "type": "default"}
    inner = outer | {
        "bos_token_id": values["bos_token_id"],
        "eos_token_id": values["eos_token_id"],
        "image_token_id": None,
        "layer_types": ["full_attention"] * 2,
        "model_type": "qwen2_5_vl_text",
        "rope_scaling": rope,
        "sliding_window": None,
        "video_token_id": None,
    }
    vision = values["vision_config"] | {"initializer_range": 0.02, "model_type": "qwen2_5_vl"}
    return {**values, "rope_scaling": rope, "text_config": inner, "vision_config": vision}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"num_key_value_heads": None, "rope_scaling": None}, None),
        ({"hidden_size": 64}, "hidden_size = 64, but text_config has 32"),
        ({"rope_theta": 5.0}, "rope_theta = 5.0, but text_config has 1000000.0"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [4, 2, 2]}}, "mrope_section = .*4, 2, 2.*2, 3, 3"),
        (
            {"rope_scaling": {"type": "yarn", "mrope_section": [2, 3, 3], "factor": 4}},
            "json: rope_scaling has type = 'yarn', which is not supported",
        ),
    ],
)
def test_a_qwen_with_its_decoders_fields_twice(changes, message, tmp_path):
    source = write_released(tmp_path, QWEN2_5_VL)
    expected = plan_import(source, report=lambda line: None)
    values = _written_by_transformers_4_53(json.loads((source / "config.json").read_text()))
    (source / "config.json").write_text(json.dumps(values | changes))
    if message is None:
        assert plan_import(source, report=lambda line: None) == expected
        return
    with pytest.raises(UserError, match=message) as caught:
        plan_import(source, report=lambda line: None)
    assert str(caught.value).startswith(str(source / "config.json"))


@pytest.fixture
def tiny_tower(monkeypatch):
    """Makes the tower that the config.json files name as small as that of the folders."""
    tower = ClipConfig(hidden_size=16, intermediate_size=24, num_layers=3, num_heads=2)
    monkeypatch.setitem(encoder_configs.TOWERS, "openai/clip-vit-large-patch14-336", tower)


# By folder: transformers' files of the same model, its chat format, how images are cut, and whether its weights are
# torch's files.
OF_HUB = {
    "liuhaotian/llava-v1.5-7b": (LLAVA_1_5, "vicuna_v1", "pad", True),
    "liuhaotian/llava-v1.6-vicuna-7b": (NEXT_VICUNA, "vicuna_v1", "anyres", False),
    "liuhaotian/llava-v1.6-mistral-7b": (NEXT_MISTRAL, "mistral_instruct", "anyres", False),
}


# Two whole folders are written and read for each of them.
@pytest.mark.parametrize("name", quick(OF_HUB, "liuhaotian/llava-v1.5-7b"))
def test_llavas_own_folders_give_the_arrays_of_transformers(name, tmp_path, tiny_tower):
    twin, template, aspect, pickled = OF_HUB[name]
    values = json.loads(json.dumps(twin.config)) | {"image_token_index": 5}
    values["text_config"]["vocab_size"] = 32000
    state = state_of(values)
    source, holds_tower = tmp_path / "own", aspect == "anyres"
    write_files(source, OWN[name])
    tensors = with_buffers(own_names(state, tower=holds_tower), layers=2)
    write_shards(source, tensors, pickled=pickled, dtype="float16" if pickled else "bfloat16")
    if pickled:
        torch.save({}, source / "mm_projector.bin")  # The whole weights stand beside it, and come first.
    twins = tmp_path / "hf"
    write_files(twins, twin, **values)
    (twins / "tokenizer.json").write_text((source / "tokenizer.json").read_text())
    write_shards(twins, released_names(state, values), dtype="float16" if pickled else "bfloat16")
    encoder = None if holds_tower else write_released(tmp_path / "clip", CLIP_336)
    import_checkpoint(source, tmp_path / "ours", encoder=encoder, report=lambda line: None)
    import_checkpoint(twins, tmp_path / "theirs", report=lambda line: None)
    config, other = read_config(tmp_path / "ours"), read_config(tmp_path / "theirs")
    assert (config.template, config.image.aspect_ratio, config.vision_feature_layer) == (template, aspect, 2)
    assert config.encoder == other.encoder
    assert config.decoder == other.decoder
    # LLaVA's own sizes are (width, height), and transformers' are (height, width); the released ones are symmetric.
    assert sorted(config.image.grids) == sorted(other.image.grids)
    found, expected = load_params(tmp_path / "ours"), load_params(tmp_path / "theirs")
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        if holds_tower or not path.startswith("encoder."):
            np.testing.assert_array_equal(found[path], value, err_msg=path)
    assert read_generation(tmp_path / "ours").eos_token_ids == (2,)


@pytest.mark.parametrize("name", PARTS)
def test_a_part_is_read_as_it_is_released(name, tmp_path):
    made = PARTS[name]
    config = write_files(tmp_path / "hub", made)
    tensors = with_buffers(released_names(state_of(config), config), layers=2)
    write_shards(tmp_path / "hub", tensors, pickled=name.startswith(("openai", "lmsys", "meta-llama/Llama-2")))
    import_checkpoint(tmp_path / "hub", tmp_path / "ours", report=lambda line: None)
    params = load_params(tmp_path / "ours")
    if "vision_config" in made.config:
        side = made.config["vision_config"]["image_size"] // made.config["vision_config"]["patch_size"]
        positions = side * side + (made.config["model_type"] == "clip")
        assert params["encoder.position_embedding"].shape == (positions, 16)
        return
    np.testing.assert_array_equal(params["decoder.embed.embedding"], tensors["model.embed_tokens.weight"])
    assert ("decoder.lm_head.kernel" in params) is not made.config["tie_word_embeddings"]
    if "generation_config.json" in made.files:
        ends = made.files["generation_config.json"]["eos_token_id"]
        ends = ends if isinstance(ends, list) else [ends]
        assert list(read_generation(tmp_path / "ours").eos_token_ids) == ends


def test_a_llama_that_may_speak_chatml_is_told(tmp_path):
    """The decoder of liuhaotian/llava-v1.6-34b is a Llama with the tokens of ChatML, and the folder has no template."""
    files = {name: one for name, one in LLAVA_1_5.files.items() if not name.startswith("chat_template")}
    source = write_released(tmp_path / "hub", Released(LLAVA_1_5.config, files, "sentencepiece", LLAVA_1_5.ids))
    lines: list[str] = []
    assert plan_import(source, report=lines.append)["template"] == "vicuna_v1"
    assert lines == []
    path = source / "tokenizer.json"
    values = json.loads(path.read_text())
    values["added_tokens"].append(values["added_tokens"][-1] | {"id": 32002, "content": "<|im_start|>"})
    path.write_text(json.dumps(values))
    assert plan_import(source, report=lines.append)["template"] == "vicuna_v1"
    assert len(lines) == 1
    assert "if it was trained in ChatML, set 'template' in config.json of the result to 'qwen_1_5'" in lines[0]


def test_a_tokenizer_that_only_sentencepiece_reads_is_told(tmp_path):
    """liuhaotian/llava-v1.5-7b and lmsys/vicuna-7b-v1.5 have tokenizer.model beside tokenizer_config.json."""
    made = PARTS["lmsys/vicuna-7b-v1.5"]
    source = write_released(tmp_path / "hub", made)
    (source / "tokenizer.model").write_bytes(b"")
    (source / "tokenizer_config.json").write_text("{}")
    lines: list[str] = []
    plan_import(source, report=lines.append)
    assert len(lines) == 1
    assert "has its tokenizer as tokenizer.model alone, which is not read" in lines[0]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    (source / "tokenizer.json").write_text(backend.to_str())
    lines.clear()
    plan_import(source, report=lines.append)
    assert lines == []


_LLAMA = PARTS["meta-llama/Meta-Llama-3-8B-Instruct"].config
_VICUNA = PARTS["lmsys/vicuna-7b-v1.5"].config
_BNB = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "quant_method": "bitsandbytes"}
_LATER_MINICPM = {"architectures": ["MiniCPMV"], "model_type": "minicpmv", "query_num": 64, "slice_config": {}}
# By what is wrong: config.json, and what the message says.
REFUSED = {
    "bitsandbytes": (
        {**LLAVA_1_5.config, "quantization_config": _BNB},
        "config.json: quantization_config = .*not read",
    ),
    "bitsandbytes, LLaVA's own": (
        {**OWN["liuhaotian/llava-v1.5-7b"].config, "quantization_config": _BNB},
        "quantization_config = .* take the checkpoint in float32, float16 or bfloat16",
    ),
    "awq": ({**QWEN2_5_VL.config, "quantization_config": {"quant_method": "awq", "bits": 4}}, "'awq'.*not read; take"),
    "gptq in a section": (
        {**LLAVA_1_5.config, "text_config": {"quantization_config": {"quant_method": "gptq"}}},
        "config.json: text_config: quantization_config = .*'gptq'",
    ),
    "naflex": ({"architectures": ["Siglip2Model"], "model_type": "siglip2"}, "NaFlex SigLIP 2.*are SiglipModel"),
    "qwen2-vl": (
        {**QWEN2_5_VL.config, "architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl"},
        "another model than Qwen2.5-VL; take a checkpoint of Qwen2_5_VLForConditionalGeneration",
    ),
    "qwen3-vl": (
        {"architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl"},
        "another model than Qwen2.5-VL; take",
    ),
    "qwen2.5-omni": ({"model_type": "qwen2_5_omni"}, "another model than Qwen2.5-VL; take"),
    "next video": (
        {"architectures": ["LlavaNextVideoForConditionalGeneration"], "model_type": "llava_next_video"},
        "a LLaVA for videos; take a checkpoint of one for images",
    ),
    "minicpm-v 2.5": (
        {**_LATER_MINICPM, "version": "2.5"},
        "version = '2.5'.*expected the config.json of MiniCPM-V 2.0",
    ),
    "minicpm-v 2.6": ({**_LATER_MINICPM, "version": 2.6}, "version = 2.6.*expected the config.json of MiniCPM-V 2.0"),
    "minicpm-o": ({"architectures": ["MiniCPMO"], "model_type": "minicpmo"}, "another model than MiniCPM-V 2.0; take"),
    "llama 3.1": (
        {
            **_LLAMA,
            "rope_scaling": {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
        },
        "rope type 'llama3' is not supported, expected 'default'; take a checkpoint whose rotary positions",
    ),
    "vicuna 16k": (
        {**_VICUNA, "rope_scaling": {"factor": 4.0, "type": "linear"}},
        "rope type 'linear' is not supported, expected 'default'; take",
    ),
    "mistral v0.1": (
        {**PARTS["mistralai/Mistral-7B-Instruct-v0.2"].config, "sliding_window": 4096},
        "sliding_window = 4096, which acts up to max_position_embeddings = 32768",
    ),
    "window in use": ({**QWEN2_5_VL.config, "use_sliding_window": True}, "use_sliding_window = True is not supported"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_computed_is_refused_with_a_way_out(name, tmp_path):
    config, message = REFUSED[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_shards(tmp_path, {"one": np.zeros(2, np.float32), "two": np.zeros(2, np.float32)})
    with pytest.raises(UserError) as caught:
        plan_import(tmp_path, report=lambda line: None)
    text = str(caught.value)
    assert text.startswith(str(tmp_path / "config.json"))
    assert "\n" not in text
    assert re.search(message, text), text


def test_the_tiling_of_the_first_processors_of_next_is_refused_where_it_is_none(tmp_path):
    """Before their class was a part of transformers, it also had the setting "clip", of one tile."""
    source = write_released(tmp_path / "hub", NEXT_MISTRAL)
    path = source / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"aspect_ratio_setting": "clip"}))
    with pytest.raises(UserError, match="aspect_ratio_setting = 'clip' is not supported, expected 'anyres'"):
        plan_import(source, report=lambda line: None)
