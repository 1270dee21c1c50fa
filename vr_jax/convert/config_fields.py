"""Tables that settle each field of the config.json of a whole LLaVA, of transformers and in LLaVA's own layout.

Those of its encoder and its decoder stand in `encoder_fields` and `decoder_fields`.
"""

from __future__ import annotations

from vr_jax.convert.common_fields import COMMON
from vr_jax.model_directory import FieldTable

_VIDEO = "Videos are not read here."
_LLAVA_TRAINING = "It is a setting of LLaVA's training."
_LLAVA_VIDEO = "LLaVA reads it for videos only."
_COUNTED = "transformers counts the vision tokens from the features."

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
        # "default" drops the first token, which is CLIP's class token; a SigLIP has none, and one of the two is right.
        "vision_feature_select_strategy": ("default", "full"),
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
).extended(COMMON)
ONEVISION_FIELDS = FieldTable(honoured=frozenset(("vision_aspect_ratio",))).extended(_HF_LLAVA_FIELDS)
NEXT_FIELDS = FieldTable(
    honoured=frozenset(),
    without_meaning={"image_seq_length": _COUNTED},
).extended(_HF_LLAVA_FIELDS)
LLAVA_1_5_FIELDS = FieldTable(
    honoured=frozenset(),
    without_meaning={
        "image_seq_length": _COUNTED,
        "image_grid_pinpoints": "This class makes one tile of every image.",
    },
).extended(_HF_LLAVA_FIELDS)
_LLAVA_FIELDS = FieldTable(
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
        "use_pos_skipping": (False,),
        "s2": (False,),
        "projector_hidden_act": ("gelu",),
    },
    without_meaning={
        "mm_hidden_size": "It is the encoder's width, which its tensors have.",
        "image_crop_resolution": "LLaVA reads it with the image_aspect_ratio 'crop_split' only.",
        "image_split_resolution": "LLaVA reads it with the image_aspect_ratio 'crop_split' only.",
        "use_image_newline_parameter": "LLaVA's own code does not read it.",
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
)
# By the name of the encoder. The fields of the decoder's class come beside them.
LLAVA_FIELDS = {
    "siglip": FieldTable(
        honoured=frozenset(),
        without_meaning={
            "mm_vision_select_layer": "LLaVA's SigLIP drops its last layer and returns the output of the others, "
            "whatever this field says."
        },
    ).extended(_LLAVA_FIELDS),
    "clip": FieldTable(honoured=frozenset(("mm_vision_select_layer",))).extended(_LLAVA_FIELDS),
}
