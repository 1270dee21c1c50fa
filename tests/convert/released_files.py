"""The JSON files of released checkpoints as the hub has them, with fewer layers and narrower ones, for tests.

Sizes of images, patches and windows are the released ones, and so are the ids of Llama's tokens. Each checkpoint's
fields were written down from its page on the hub; fields that all files of one kind repeat stand in a constant.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

CLIP_PIXELS = {
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
}
# What transformers 4 wrote into every inner config of a CLIP.
_OLD_INNER = {
    "_name_or_path": "",
    "add_cross_attention": False,
    "architectures": None,
    "attention_dropout": 0.0,
    "bad_words_ids": None,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "decoder_start_token_id": None,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "dropout": 0.0,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None,
    "finetuning_task": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "hidden_act": "quick_gelu",
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "layer_norm_eps": 1e-05,
    "length_penalty": 1.0,
    "max_length": 20,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "prefix": None,
    "problem_type": None,
    "pruned_heads": {},
    "remove_invalid_values": False,
    "repetition_penalty": 1.0,
    "return_dict": True,
    "return_dict_in_generate": False,
    "sep_token_id": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "task_specific_params": None,
    "temperature": 1.0,
    "tf_legacy_loss": False,
    "tie_encoder_decoder": False,
    "tie_word_embeddings": True,
    "tokenizer_class": None,
    "top_k": 50,
    "top_p": 1.0,
    "torch_dtype": None,
    "torchscript": False,
    "transformers_version": "4.21.3",
    "typical_p": 1.0,
    "use_bfloat16": False,
}
_TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 3}
# Text sizes that the released files state, or leave to the defaults of the class.
_TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
_LLAVA_VISION = {
    **_TOWER,
    "image_size": 336,
    "model_type": "clip_vision_model",
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32000,
}
_LLAVA_TOP = {
    "ignore_index": -100,
    "image_token_index": 32000,
    "projector_hidden_act": "gelu",
    "torch_dtype": "float16",
    "vision_config": _LLAVA_VISION,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}
_VICUNA_TEXT = {
    **_TEXT,
    "_name_or_path": "lmsys/vicuna-7b-v1.5",
    "architectures": ["LlamaForCausalLM"],
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "rms_norm_eps": 1e-05,
    "torch_dtype": "float16",
    "vocab_size": 32064,
}
_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
_CLIP_PROCESSOR = {
    **CLIP_PIXELS,
    "crop_size": {"height": 336, "width": 336},
    "do_convert_rgb": True,
    "do_rescale": True,
    "image_processor_type": "CLIPImageProcessor",
    "processor_class": "LlavaProcessor",
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 336},
}
_NEXT_PROCESSOR = {
    **_CLIP_PROCESSOR,
    "aspect_ratio_setting": "anyres",
    "do_pad": True,
    "image_grid_pinpoints": _PINPOINTS,
    "image_processor_type": "LlavaNextImageProcessor",
    "processor_class": "LlavaNextProcessor",
}


def _processor(name: str) -> dict[str, Any]:
    return {
        "image_token": "<image>",
        "num_additional_image_tokens": 1,
        "patch_size": 14,
        "processor_class": name,
        "vision_feature_select_strategy": "default",
    }


_IMAGES_FIRST = (
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}"
)
_ALL_TEXTS = "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
_VICUNA_TURNS = (
    _IMAGES_FIRST
    + "{% if message['role'] != 'assistant' %}"
    + _ALL_TEXTS
    + "{{ content['text'] + ' '}}{% endfor %}{% else %}"
    + _ALL_TEXTS
    + "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
LLAVA_1_5_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    + _VICUNA_TURNS
)
NEXT_VICUNA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'][0]['text'] }}"
    "{% else %}{{ message['role'].upper() + ': '}}{% endif %}" + _VICUNA_TURNS
)
# Its end of a reply is misspelt.
NEXT_MISTRAL_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ '<<SYS>>\n' + message['content'][0]['text'] + '\n<</SYS>>\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ '[INST] ' }}"
    + _IMAGES_FIRST
    + _ALL_TEXTS
    + "{{ content['text'] }}{% endfor %}{{' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'][0]['text'] + '<\\s> '}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
NEXT_LLAMA_3_TEMPLATE = (
    "{{'<|begin_of_text|>'}}{% for message in messages %}"
    "{{'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'}}"
    + _IMAGES_FIRST
    + _ALL_TEXTS
    + "{{ content['text'] + '<|eot_id|>'}}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
INTERLEAVE_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    + _ALL_TEXTS
    + "{{ '\n' + content['text'] }}{% endfor %}{% else %}"
    + _ALL_TEXTS
    + "{% generation %}{{ '\n' + content['text'] }}{% endgeneration %}{% endfor %}{% endif %}"
    "{{'<|im_end|>'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN2_5_VL_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_TOKENIZER = {
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<s>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "</s>",
    "legacy": False,
    "model_max_length": 1000000000000000019884624838656,
    "pad_token": "<pad>",
    "padding_side": "left",
    "processor_class": "LlavaProcessor",
    "sp_model_kwargs": {},
    "tokenizer_class": "LlamaTokenizer",
    "trust_remote_code": False,
    "unk_token": "<unk>",
    "use_default_system_prompt": False,
}
# The decoder's fields in config.json of liuhaotian/llava-v1.5-7b, as transformers 4.31 wrote them.
_OWN_LLAMA = {
    **_TEXT,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 4096,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0",
    "use_cache": True,
    "vocab_size": 32000,
}
_OWN_MM = {
    "freeze_mm_mlp_adapter": False,
    "freeze_mm_vision_resampler": False,
    "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None,
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "tune_mm_mlp_adapter": False,
    "tune_mm_vision_resampler": False,
    "use_mm_proj": True,
}
_OWN_NEXT = {
    **_OWN_MM,
    "image_aspect_ratio": "anyres",
    "image_crop_resolution": 224,
    "image_grid_pinpoints": _PINPOINTS,
    "image_split_resolution": 224,
    "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_lr": None,
    "mm_vision_tower_lr": 2e-06,
    "tokenizer_model_max_length": 4096,
    "tokenizer_padding_side": "right",
    "unfreeze_mm_vision_tower": True,
}
_OWN_MISTRAL = {
    **{name: value for name, value in _OWN_LLAMA.items() if name not in ("pad_token_id", "pretraining_tp")},
    "attention_dropout": 0.0,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 1,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.2",
}
del _OWN_MISTRAL["rope_scaling"]


@dataclass(frozen=True)
class Released:
    """The JSON files of one released checkpoint.

    Attributes:
        config: config.json.
        files: The other JSON files by their names.
        tokenizer: "sentencepiece" for one of Llama's kind, "llama_3" or "chatml" for one of bytes, or None.
        ids: Tokens with the ids that they have, of a tokenizer of Llama's kind.
    """

    config: dict[str, Any]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    tokenizer: str | None = None
    ids: dict[str, int] = field(default_factory=dict)


_IMAGE_AND_PAD = {"<image>": 32000, "<pad>": 32001}
LLAVA_1_5 = Released(
    {
        **_LLAVA_TOP,
        "architectures": ["LlavaForConditionalGeneration"],
        "image_seq_length": 576,
        "model_type": "llava",
        "pad_token_id": 32001,
        "text_config": _VICUNA_TEXT,
        "tie_word_embeddings": False,
        "transformers_version": "4.36.0.dev0",
        "vocab_size": 32064,
    },
    {
        "generation_config.json": {
            "_from_model_config": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 32001,
            "transformers_version": "4.36.0.dev0",
        },
        "preprocessor_config.json": _CLIP_PROCESSOR,
        "processor_config.json": _processor("LlavaProcessor"),
        "chat_template.json": {"chat_template": LLAVA_1_5_TEMPLATE},
        "tokenizer_config.json": {**LLAMA_TOKENIZER, "extra_special_tokens": {"image_token": "<image>"}},
    },
    "sentencepiece",
    _IMAGE_AND_PAD,
)
NEXT_MISTRAL = Released(
    {
        **_LLAVA_TOP,
        "architectures": ["LlavaNextForConditionalGeneration"],
        "image_grid_pinpoints": _PINPOINTS,
        "image_seq_length": 576,
        "model_type": "llava_next",
        "multimodal_projector_bias": True,
        "text_config": {
            **_TEXT,
            "_name_or_path": "mistralai/Mistral-7B-Instruct-v0.2",
            "architectures": ["MistralForCausalLM"],
            "max_position_embeddings": 32768,
            "model_type": "mistral",
            "num_key_value_heads": 1,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "torch_dtype": "bfloat16",
            "vocab_size": 32064,
        },
        "tie_word_embeddings": False,
        "transformers_version": "4.39.0.dev0",
        "use_image_newline_parameter": True,
        "vocab_size": 32064,
    },
    {
        "generation_config.json": {
            "_from_model_config": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "transformers_version": "4.39.0.dev0",
        },
        "preprocessor_config.json": _NEXT_PROCESSOR,
        "processor_config.json": _processor("LlavaNextProcessor"),
        "chat_template.json": {"chat_template": NEXT_MISTRAL_TEMPLATE},
        "tokenizer_config.json": {**LLAMA_TOKENIZER, "processor_class": "LlavaNextProcessor"},
    },
    "sentencepiece",
    _IMAGE_AND_PAD,
)
NEXT_VICUNA = Released(
    {
        **NEXT_MISTRAL.config,
        "text_config": {**_VICUNA_TEXT, "pad_token_id": 0},
        "use_image_newline_parameter": True,
    },
    {
        **NEXT_MISTRAL.files,
        "generation_config.json": {
            "_from_model_config": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "transformers_version": "4.39.0.dev0",
        },
        "chat_template.json": {"chat_template": NEXT_VICUNA_TEMPLATE},
    },
    "sentencepiece",
    _IMAGE_AND_PAD,
)
# The ids of its tokens are smaller than the released ones (128000 and more).
NEXT_LLAMA_3 = Released(
    {
        **NEXT_MISTRAL.config,
        "image_token_index": "<image>",
        "text_config": {
            **_TEXT,
            "_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct",
            "architectures": ["LlamaForCausalLM"],
            "bos_token_id": "<|begin_of_text|>",
            "eos_token_id": "<|end_of_text|>",
            "max_position_embeddings": 8192,
            "model_type": "llama",
            "num_key_value_heads": 1,
            "rms_norm_eps": 1e-05,
            "rope_theta": 500000.0,
            "torch_dtype": "bfloat16",
            "vocab_size": 512,
        },
    },
    {
        "generation_config.json": {
            "_from_model_config": True,
            "bos_token_id": "<|begin_of_text|>",
            "eos_token_id": "<|end_of_text|>",
            "pad_token_id": "<pad>",
            "transformers_version": "4.42.0.dev0",
        },
        "preprocessor_config.json": _NEXT_PROCESSOR,
        "processor_config.json": _processor("LlavaNextProcessor"),
        "chat_template.json": {"chat_template": NEXT_LLAMA_3_TEMPLATE},
        "tokenizer_config.json": {
            "bos_token": "<|begin_of_text|>",
            "clean_up_tokenization_spaces": True,
            "eos_token": "<|end_of_text|>",
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": 1000000000000000019884624838656,
            "pad_token": "<pad>",
            "processor_class": "LlavaNextProcessor",
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    },
    "llama_3",
)
INTERLEAVE = Released(
    {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_seq_length": 576,
        "image_token_index": "<image>",
        "model_type": "llava",
        "projector_hidden_act": "gelu",
        "text_config": {
            **_TEXT,
            "_name_or_path": "Qwen/Qwen1.5-0.5B-Chat",
            "architectures": ["Qwen2ForCausalLM"],
            "bos_token_id": "<|endoftext|>",
            "eos_token_id": "<|im_end|>",
            "max_window_layers": 21,
            "model_type": "qwen2",
            "num_key_value_heads": 2,
            "rope_theta": 1000000.0,
            "sliding_window": 32768,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "vocab_size": 512,
        },
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.42.0.dev0",
        "vision_config": {
            **_TOWER,
            "image_size": 384,
            "model_type": "siglip_vision_model",
            "patch_size": 14,
            "vision_use_head": False,
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    },
    {
        "generation_config.json": {
            "_from_model_config": True,
            "bos_token_id": "<|endoftext|>",
            "eos_token_id": "<|im_end|>",
            "transformers_version": "4.42.0.dev0",
        },
        "preprocessor_config.json": {
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_processor_type": "SiglipImageProcessor",
            "image_std": [0.5, 0.5, 0.5],
            "processor_class": "LlavaProcessor",
            "resample": 3,
            "rescale_factor": 0.00392156862745098,
            "size": {"height": 384, "width": 384},
        },
        "processor_config.json": {
            "image_token": "<image>",
            "num_additional_image_tokens": 0,
            "patch_size": 14,
            "processor_class": "LlavaProcessor",
            "vision_feature_select_strategy": "full",
        },
        "chat_template.json": {"chat_template": INTERLEAVE_TEMPLATE},
        "tokenizer_config.json": {
            "add_prefix_space": False,
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "model_max_length": 32768,
            "pad_token": "<|endoftext|>",
            "processor_class": "LlavaProcessor",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    },
    "chatml",
)
QWEN2_5_VL = Released(
    {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": "<|endoftext|>",
        "eos_token_id": "<|im_end|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
        "vision_token_id": "<|vision_pad|>",
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "hidden_act": "silu",
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 24,
        "max_position_embeddings": 128000,
        "max_window_layers": 70,
        "model_type": "qwen2_5_vl",
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "depth": 4,
            "hidden_act": "silu",
            "hidden_size": 32,
            "intermediate_size": 24,
            "num_heads": 2,
            "in_chans": 3,
            "out_hidden_size": 32,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [1, 3],
            "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "vocab_size": 512,
    },
    {
        "generation_config.json": {
            "bos_token_id": "<|endoftext|>",
            "pad_token_id": "<|endoftext|>",
            "do_sample": True,
            "eos_token_id": ["<|im_end|>", "<|endoftext|>"],
            "repetition_penalty": 1.05,
            "temperature": 0.000001,
            "transformers_version": "4.49.0",
        },
        "preprocessor_config.json": {
            "min_pixels": 3136,
            "max_pixels": 12845056,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
        },
        "chat_template.json": {"chat_template": QWEN2_5_VL_TEMPLATE},
        "tokenizer_config.json": {
            "add_bos_token": False,
            "add_prefix_space": False,
            "bos_token": None,
            "chat_template": "{% for message in messages %}{{ message.content }}{% endfor %}",
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "model_max_length": 131072,
            "pad_token": "<|endoftext|>",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    },
    "chatml",
)
WHOLE = {
    "llava-hf/llava-1.5-7b-hf": LLAVA_1_5,
    "llava-hf/llava-v1.6-mistral-7b-hf": NEXT_MISTRAL,
    "llava-hf/llava-v1.6-vicuna-7b-hf": NEXT_VICUNA,
    "llava-hf/llama3-llava-next-8b-hf": NEXT_LLAMA_3,
    "llava-hf/llava-interleave-qwen-0.5b-hf": INTERLEAVE,
    "Qwen/Qwen2.5-VL-3B-Instruct": QWEN2_5_VL,
}
OWN = {
    "liuhaotian/llava-v1.5-7b": Released(
        {
            **_OWN_LLAMA,
            **_OWN_MM,
            "_name_or_path": "llava-v1.5-7b",
            "architectures": ["LlavaLlamaForCausalLM"],
            "image_aspect_ratio": "pad",
            "max_length": 4096,
            "model_type": "llava",
            "unfreeze_mm_vision_tower": False,
        },
        {
            "generation_config.json": {
                "_from_model_config": True,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "max_length": 4096,
                "pad_token_id": 0,
                "transformers_version": "4.31.0",
            },
            "tokenizer_config.json": {**LLAMA_TOKENIZER, "pad_token": None},
        },
        "sentencepiece",
    ),
    "liuhaotian/llava-v1.6-vicuna-7b": Released(
        {
            **_OWN_LLAMA,
            **_OWN_NEXT,
            "_name_or_path": "lmsys/vicuna-7b-v1.5",
            "architectures": ["LlavaLlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "model_type": "llava_llama",
            "rope_theta": 10000.0,
            "transformers_version": "4.36.2",
        },
        {
            "generation_config.json": {
                "_from_model_config": True,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "max_length": 4096,
                "pad_token_id": 0,
                "temperature": 0.9,
                "top_p": 0.6,
                "transformers_version": "4.36.2",
            },
            "tokenizer_config.json": {**LLAMA_TOKENIZER, "pad_token": "<unk>", "padding_side": "right"},
        },
        "sentencepiece",
    ),
    "liuhaotian/llava-v1.6-mistral-7b": Released(
        {
            **_OWN_MISTRAL,
            **_OWN_NEXT,
            "_name_or_path": "mistralai/Mistral-7B-Instruct-v0.2",
            "architectures": ["LlavaMistralForCausalLM"],
            "model_type": "llava_mistral",
        },
        {
            "generation_config.json": {
                "_from_model_config": True,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "transformers_version": "4.36.2",
            },
            "tokenizer_config.json": {**LLAMA_TOKENIZER, "pad_token": "<unk>", "padding_side": "right"},
        },
        "sentencepiece",
    ),
}
_CLIP_VISION_DICT = {**_TOWER, "image_size": 336, "patch_size": 14, "projection_dim": 768}
_CLIP_TEXT_DICT = {**_TOWER, "projection_dim": 768, "vocab_size": 49408}
CLIP_336 = Released(
    {
        "_name_or_path": "openai/clip-vit-large-patch14-336",
        "architectures": ["CLIPModel"],
        "initializer_factor": 1.0,
        "logit_scale_init_value": 2.6592,
        "model_type": "clip",
        "projection_dim": 768,
        "text_config": {
            **_OLD_INNER,
            **_CLIP_TEXT_DICT,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "max_position_embeddings": 77,
            "model_type": "clip_text_model",
            "pad_token_id": 1,
        },
        "text_config_dict": _CLIP_TEXT_DICT,
        "torch_dtype": "float32",
        "transformers_version": None,
        "vision_config": {
            **_OLD_INNER,
            **_CLIP_VISION_DICT,
            "bos_token_id": None,
            "eos_token_id": None,
            "model_type": "clip_vision_model",
            "pad_token_id": None,
        },
        "vision_config_dict": _CLIP_VISION_DICT,
    },
    {
        "preprocessor_config.json": {
            **CLIP_PIXELS,
            "crop_size": 336,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "size": 336,
        },
        "tokenizer_config.json": {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77},
    },
)
SIGLIP_2 = Released(
    {
        "architectures": ["SiglipModel"],
        "initializer_factor": 1.0,
        "model_type": "siglip",
        "text_config": {
            **_TOWER,
            "model_type": "siglip_text_model",
            "projection_size": 16,
            "torch_dtype": "float32",
            "vocab_size": 320,
        },
        "torch_dtype": "float32",
        "transformers_version": "4.49.0.dev0",
        "vision_config": {
            **_TOWER,
            "image_size": 384,
            "model_type": "siglip_vision_model",
            "patch_size": 14,
            "torch_dtype": "float32",
        },
    },
    {
        "preprocessor_config.json": {
            "do_convert_rgb": None,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_processor_type": "SiglipImageProcessor",
            "image_std": [0.5, 0.5, 0.5],
            "processor_class": "SiglipProcessor",
            "resample": 2,
            "rescale_factor": 0.00392156862745098,
            "size": {"height": 384, "width": 384},
        },
    },
)
_LLAMA_TOP = {**_OWN_LLAMA, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
_MISTRAL_TOP = {**_OWN_MISTRAL, "architectures": ["MistralForCausalLM"], "model_type": "mistral"}
PARTS = {
    "openai/clip-vit-large-patch14-336": CLIP_336,
    "google/siglip2-so400m-patch14-384": SIGLIP_2,
    "meta-llama/Llama-2-7b-chat-hf": Released(
        {**_LLAMA_TOP, "_name_or_path": "meta-llama/Llama-2-7b-chat-hf", "transformers_version": "4.32.0.dev0"},
        {
            "generation_config.json": {
                "bos_token_id": 1,
                "do_sample": True,
                "eos_token_id": 2,
                "pad_token_id": 0,
                "temperature": 0.6,
                "max_length": 4096,
                "top_p": 0.9,
                "transformers_version": "4.32.0.dev0",
            }
        },
    ),
    "lmsys/vicuna-7b-v1.5": Released(
        {**_LLAMA_TOP, "_name_or_path": "vicuna-7b-v1.5", "pad_token_id": 0},
        {
            "generation_config.json": {
                "bos_token_id": 1,
                "eos_token_id": 2,
                "max_length": 4096,
                "pad_token_id": 0,
                "temperature": 0.9,
                "top_p": 0.6,
                "transformers_version": "4.31.0",
            }
        },
    ),
    "meta-llama/Meta-Llama-3-8B-Instruct": Released(
        {
            **_LLAMA_TOP,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 128000,
            "eos_token_id": 128009,
            "max_position_embeddings": 8192,
            "num_key_value_heads": 1,
            "rope_theta": 500000.0,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.40.0.dev0",
            "vocab_size": 128256,
        },
        {
            "generation_config.json": {
                "bos_token_id": 128000,
                "eos_token_id": [128001, 128009],
                "do_sample": True,
                "temperature": 0.6,
                "max_length": 4096,
                "top_p": 0.9,
                "transformers_version": "4.40.0.dev0",
            }
        },
    ),
    "mistralai/Mistral-7B-Instruct-v0.2": Released(
        _MISTRAL_TOP,
        {
            "generation_config.json": {
                "_from_model_config": True,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "transformers_version": "4.36.0",
            }
        },
    ),
    "mistralai/Mistral-7B-Instruct-v0.3": Released({**_MISTRAL_TOP, "vocab_size": 32768}),
    "Qwen/Qwen3-0.6B": Released(
        {
            **_TEXT,
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "head_dim": 32,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "max_position_embeddings": 40960,
            "max_window_layers": 28,
            "model_type": "qwen3",
            "num_key_value_heads": 1,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.51.0",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        {
            "generation_config.json": {
                "bos_token_id": 151643,
                "do_sample": True,
                "eos_token_id": [151645, 151643],
                "pad_token_id": 151643,
                "temperature": 0.6,
                "top_k": 20,
                "top_p": 0.95,
                "transformers_version": "4.51.0",
            }
        },
    ),
}
