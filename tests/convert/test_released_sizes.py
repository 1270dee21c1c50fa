"""The config.json of the released LLaVA-1.5 and LLaVA-NeXT is read, and the parameters are as many as transformers'.

Nothing is allocated: transformers builds on its meta device, and we trace shapes.
"""

from __future__ import annotations

import math
from pathlib import Path

import jax
import pytest

from tests.convert.conftest import torch, transformers
from vr_jax.convert.config_writing import write_hf_llava
from vr_jax.convert.configs import read_hf_llava
from vr_jax.model.decoders.transformer import TransformerConfig
from vr_jax.model.encoders.clip import ClipConfig
from vr_jax.model.vlm import abstract_model

FILE = Path("config.json")
CLIP = {
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "model_type": "clip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32000,
}
COMMON = {
    "ignore_index": -100,
    "projector_hidden_act": "gelu",
    "torch_dtype": "float16",
    "vision_config": CLIP,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}
NEXT = {
    **COMMON,
    "architectures": ["LlavaNextForConditionalGeneration"],
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "model_type": "llava_next",
    "tie_word_embeddings": False,
    "use_image_newline_parameter": True,
}
VICUNA = {
    "_name_or_path": "lmsys/vicuna-7b-v1.5",
    "architectures": ["LlamaForCausalLM"],
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "rms_norm_eps": 1e-05,
    "torch_dtype": "float16",
    "vocab_size": 32064,
}
# The fields of llava-hf's folders that concern the model.
RELEASED = {
    "llava-1.5-7b-hf": {
        **COMMON,
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": 32000,
        "model_type": "llava",
        "pad_token_id": 32001,
        "text_config": VICUNA,
    },
    "llava-v1.6-vicuna-7b-hf": {**NEXT, "image_token_index": 32000, "text_config": VICUNA},
    "llava-v1.6-mistral-7b-hf": {
        **NEXT,
        "image_token_index": 32000,
        "text_config": {
            "_name_or_path": "mistralai/Mistral-7B-Instruct-v0.2",
            "architectures": ["MistralForCausalLM"],
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "model_type": "mistral",
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "torch_dtype": "bfloat16",
            "vocab_size": 32064,
        },
    },
    "llama3-llava-next-8b-hf": {
        **NEXT,
        "image_token_index": 128256,
        "text_config": {
            "_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct",
            "architectures": ["LlamaForCausalLM"],
            "bos_token_id": 128000,
            "eos_token_id": 128001,
            "intermediate_size": 14336,
            "max_position_embeddings": 8192,
            "model_type": "llama",
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 500000.0,
            "torch_dtype": "float16",
            "vocab_size": 128320,
        },
    },
}
# In millions, of transformers 5.23.
MILLIONS = {
    "llava-1.5-7b-hf": 7063.43,
    "llava-v1.6-vicuna-7b-hf": 7063.43,
    "llava-v1.6-mistral-7b-hf": 7566.75,
    "llama3-llava-next-8b-hf": 8355.28,
}


def count(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree_util.tree_leaves(tree))


@pytest.mark.parametrize("name", RELEASED)
def test_parameters_of_a_released_model(name):
    values = RELEASED[name]
    config = read_hf_llava(values, FILE)
    assert config.encoder == ClipConfig()
    assert (config.vision_feature_layer, config.cells_per_tile) == (23, 576)
    assert config.image_token_id == values["image_token_index"]
    text = values["text_config"]
    assert config.decoder == TransformerConfig(
        vocab_size=text["vocab_size"],
        hidden_size=4096,
        intermediate_size=text.get("intermediate_size", 11008),
        num_layers=32,
        num_heads=32,
        num_kv_heads=text.get("num_key_value_heads", 32),
        attention_bias=False,
        rope_theta=text.get("rope_theta", 10000.0),
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    model = abstract_model(config)
    newline = 0 if config.image.unpad else 4096  # LLaVA-1.5 has none
    fields = {name: value for name, value in values.items() if name != "model_type"}
    hf_config = transformers.AutoConfig.for_model(values["model_type"], **fields)
    with torch.device("meta"):
        theirs = transformers.AutoModelForImageTextToText.from_config(hf_config)
    expected = sum(parameter.numel() for parameter in theirs.parameters())
    assert count(model) - newline == expected
    assert expected == pytest.approx(MILLIONS[name] * 1e6, abs=0.01e6)


@pytest.mark.parametrize("name", RELEASED)
def test_the_config_of_a_released_model_is_written_as_it_was_read(name):
    config = read_hf_llava(RELEASED[name], FILE)
    written = write_hf_llava(config, config.image_token_id)
    assert written["architectures"] == RELEASED[name]["architectures"]
    same = ("vision_feature_layer", "vision_feature_select_strategy", "image_token_index", "model_type")
    assert {field: written[field] for field in same} == {field: RELEASED[name][field] for field in same}
    assert read_hf_llava(written, FILE) == config
