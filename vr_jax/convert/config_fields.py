"""Tables that settle each field of config.json, for each class of transformers and for LLaVA's own layout."""

from __future__ import annotations

from vr_jax.model_directory import GENERATION_TABLE, FieldTable

_RECORD = "It records how the file came about."
_TYPE = "Each tensor keeps the type that it is stored in."
_TRAINING = "It acts in training only."
_OUTPUT = "It chooses what the model of transformers returns beside its result."
_TASK = "It belongs to classification."
_OTHER_DECODER = "It belongs to encoder-decoder models."
_VIDEO = "Videos are not read here."
_LLAVA_TRAINING = "It is a setting of LLaVA's training."
_LLAVA_VIDEO = "LLaVA reads it for videos only."
_ATTENTION = "It chooses how transformers computes attention, not its result."

# Settings of generation that old versions of transformers wrote into config.json: neutral ones are allowed.
_OLD_GENERATION = FieldTable(
    honoured=frozenset(("eos_token_id",)),
    fixed={
        **GENERATION_TABLE.fixed,
        "repetition_penalty": (1.0,),
        "min_new_tokens": (0, None),
        "suppress_tokens": (None, []),
        "begin_suppress_tokens": (None, []),
    },
    without_meaning={
        **GENERATION_TABLE.without_meaning,
        "max_new_tokens": "transformers reads it from generation_config.json.",
        "do_sample": "The commands decode greedily, or sample as --temperature says.",
    },
)
_COMMON = FieldTable(
    honoured=frozenset(("architectures", "model_type")),
    fixed={
        "quantization_config": (None,),
        "transformers_weights": (None,),
        "per_layer_config": (None, {}),
        "is_encoder_decoder": (False,),
        "add_cross_attention": (False,),
        "pruned_heads": (None, {}),
        "tie_last_hidden_states": (None,),
    },
    without_meaning={
        **dict.fromkeys(("transformers_version", "_name_or_path", "name_or_path", "_commit_hash"), _RECORD),
        **dict.fromkeys(("torch_dtype", "dtype", "use_bfloat16"), _TYPE),
        **dict.fromkeys(("output_hidden_states", "output_attentions", "return_dict", "torchscript"), _OUTPUT),
        **dict.fromkeys(
            ("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params"), _TASK
        ),
        **dict.fromkeys(
            ("cross_attention_hidden_size", "tie_encoder_decoder", "is_decoder", "decoder_start_token_id"),
            _OTHER_DECODER,
        ),
        **dict.fromkeys(
            (
                "_attn_implementation",
                "_attn_implementation_autoset",
                "attn_implementation",
                "_experts_implementation",
                "experts_implementation",
            ),
            _ATTENTION,
        ),
        **dict.fromkeys(("initializer_range", "initializer_factor", "attention_dropout"), _TRAINING),
        "chunk_size_feed_forward": "It cuts the computation into pieces and changes no result.",
        "use_cache": "It changes how transformers computes the tokens, not which ones.",
        "tokenizer_class": "The tokenizer's own files name its class.",
        "sep_token_id": "transformers does not read it for these classes.",
        "prefix": "transformers does not read it for these classes.",
        "tf_legacy_loss": "It belongs to TensorFlow.",
        "auto_map": "No code of the folder is run.",
    },
).extended(_OLD_GENERATION)

SIGLIP_FIELDS = FieldTable(
    honoured=frozenset(
        (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "image_size",
            "patch_size",
            "layer_norm_eps",
        )
    ),
    fixed={"hidden_act": ("gelu_pytorch_tanh",), "num_channels": (3,)},
    without_meaning={
        "vision_use_head": "The pooling head is not read; LLaVA takes hidden states.",
        "projection_dim": "It belongs to CLIP's projection, which SigLIP does not have.",
        "vocab_size": "An encoder of images has no vocabulary.",
    },
).extended(_COMMON)
SIGLIP_WHOLE_FIELDS = FieldTable(
    honoured=frozenset(("vision_config",)),
    without_meaning={
        "text_config": "SigLIP's text tower is left out.",
        "vision_config_dict": "transformers does not read it.",
        "text_config_dict": "transformers does not read it.",
    },
).extended(_COMMON)
QWEN2_FIELDS = FieldTable(
    honoured=frozenset(
        (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "rms_norm_eps",
            "tie_word_embeddings",
            "head_dim",
            "layer_types",
            "rope_theta",
            "rope_scaling",
            "rope_parameters",
        )
    ),
    fixed={
        "hidden_act": ("silu",),
        "use_sliding_window": (False,),
        "attention_bias": (True,),
        "mlp_bias": (False,),
        "partial_rotary_factor": (1.0,),
        "use_mrope": (False,),
    },
    without_meaning={
        "max_position_embeddings": "Positions have no limit with the rotary embedding of this type.",
        "sliding_window": "It acts with use_sliding_window only.",
        "max_window_layers": "It acts with use_sliding_window only.",
        "pretraining_tp": "transformers does not read it for these classes.",
    },
).extended(_COMMON)
_HF_LLAVA_FIELDS = FieldTable(
    honoured=frozenset(
        (
            "vision_config",
            "text_config",
            "vision_feature_layer",
            "image_grid_pinpoints",
            "image_token_index",
            "image_token_id",
            "tie_word_embeddings",
        )
    ),
    fixed={
        "vision_feature_select_strategy": ("full",),  # "default" drops the first patch as if it were a CLS token
        "projector_hidden_act": ("gelu",),
        "multimodal_projector_bias": (True,),
        "use_image_newline_parameter": (True,),
    },
    without_meaning={
        "video_token_index": _VIDEO,
        "video_token_id": _VIDEO,
        "ignore_index": "It marks tokens without a target in training.",
        "vocab_size": "That of text_config counts.",
        "hidden_size": "That of text_config counts.",
    },
).extended(_COMMON)
ONEVISION_FIELDS = FieldTable(honoured=frozenset(("vision_aspect_ratio",))).extended(_HF_LLAVA_FIELDS)
NEXT_FIELDS = FieldTable(
    honoured=frozenset(),
    without_meaning={"image_seq_length": "transformers counts the vision tokens from the features."},
).extended(_HF_LLAVA_FIELDS)
LLAVA_FIELDS = FieldTable(
    honoured=frozenset(
        (
            "mm_vision_tower",
            "vision_tower",
            "image_aspect_ratio",
            "image_grid_pinpoints",
            "vr_jax",
        )
    ),
    fixed={
        "mm_projector_type": ("mlp2x_gelu",),
        "mm_resampler_type": (None,),
        "mm_use_im_start_end": (False,),
        "mm_patch_merge_type": ("flat", "spatial_unpad"),
        "mm_vision_select_feature": ("patch",),
        "image_crop_resolution": (None,),
        "image_split_resolution": (None,),
        "use_pos_skipping": (False,),
        "s2": (False,),
        "projector_hidden_act": ("gelu",),
    },
    without_meaning={
        "mm_hidden_size": "It is the encoder's width, which its tensors have.",
        "mm_vision_select_layer": "LLaVA's SigLIP drops its last layer and returns the output of the others, whatever "
        "this field says.",
        **dict.fromkeys(
            (
                "mm_newline_position",
                "mm_spatial_pool_mode",
                "mm_spatial_pool_stride",
                "mm_spatial_pool_out_channels",
                "mm_perceiver_depth",
                "mm_perceiver_latents",
                "mm_perceiver_ff_mult",
                "mm_perceiver_pretrained",
                "mm_qformer_depth",
                "mm_qformer_latents",
                "mm_qformer_pretrained",
                "add_faster_video",
                "add_time_instruction",
                "faster_token_stride",
                "force_sample",
                "video_token_index",
            ),
            _LLAVA_VIDEO,
        ),
        **dict.fromkeys(
            (
                "mm_projector_lr",
                "mm_vision_tower_lr",
                "mm_tunable_parts",
                "mm_use_im_patch_token",
                "use_mm_proj",
                "tune_mm_mlp_adapter",
                "tune_mm_vision_resampler",
                "freeze_mm_mlp_adapter",
                "freeze_mm_vision_resampler",
                "unfreeze_mm_vision_tower",
                "unfreeze_language_model",
                "mm_vision_resampler_type",
                "pretrain_mm_mlp_adapter",
                "vision_tower_pretrained",
                "delay_load",
                "pos_skipping_range",
                "image_grid_pinpoints_list",
                "tokenizer_model_max_length",
                "tokenizer_padding_side",
                "ignore_index",
            ),
            _LLAVA_TRAINING,
        ),
        # Published checkpoints carry the defaults of transformers' LLaVA config beside LLaVA's own fields.
        **dict.fromkeys(
            (
                "vision_config",
                "text_config",
                "image_token_index",
                "vision_feature_layer",
                "vision_feature_select_strategy",
            ),
            "LLaVA's own code does not read it.",
        ),
    },
).extended(QWEN2_FIELDS)
