"""Tables that settle each field of config.json and preprocessor_config.json of MiniCPM-V 2.0, and of MiniCPM."""

from __future__ import annotations

from vr_jax.convert.common_fields import COMMON
from vr_jax.model_directory import FieldTable

# The fields of the decoder's config, by our names.
SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "tie_word_embeddings": "tie_word_embeddings",
}
SCALES = ("scale_emb", "dim_model_base", "scale_depth")
MARKERS = {
    "im_start_token_id": "<image>",
    "im_end_token_id": "</image>",
    "slice_start_token_id": "<slice>",
    "slice_end_token_id": "</slice>",
    "unk_token_id": "<unk>",
}

MINICPM_FIELDS = FieldTable(
    honoured=frozenset((*SIZES.values(), *SCALES)),
    fixed={
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "rope_scaling": (None,),
    },
    without_meaning={
        "max_position_embeddings": "Positions have no limit with the rotary embedding of this type.",
        "pretraining_tp": "It cuts the computation into pieces and changes no result.",
        "pad_token_id": "It fills rows after their end, which is cut off.",
        "unk_token_id": "The tokenizer's own files have it.",
    },
).extended(COMMON)
MINICPM_V_FIELDS = FieldTable(
    honoured=frozenset(
        (
            "vision_encoder",
            "query_num",
            "drop_vision_last_layer",
            "patch_size",
            "max_slice_nums",
            "scale_resolution",
            "vr_jax",
            *MARKERS,
        )
    ),
    fixed={"slice_mode": (True,), "mm_use_im_start_end": (True,)},
    without_meaning={
        "image_size": "The remote code does not read it; scale_resolution is the size of a slice.",
    },
).extended(MINICPM_FIELDS)
PROCESSOR_FIELDS = FieldTable(
    honoured=frozenset(
        (
            "image_processor_type",
            "norm_mean",
            "norm_std",
            "max_slice_nums",
            "scale_resolution",
            "patch_size",
            "image_feature_size",
        )
    ),
    fixed={
        "im_start": ("<image>",),
        "im_end": ("</image>",),
        "slice_start": ("<slice>",),
        "slice_end": ("</slice>",),
        "unk": ("<unk>",),
        "slice_mode": (True,),
    },
    without_meaning={
        "auto_map": "No code of the folder is run.",
        "processor_class": "It names the class that holds the image processor.",
        "transformers_version": "It records how the file came about.",
    },
)
PROCESSOR_CLASS = "MiniCPMVImageProcessor"
