"""Tables that settle each field of the JSON files of a Qwen2.5-VL of transformers.

config.json has two forms. transformers 5 writes the decoder's fields into `text_config`; the released files have them
beside `vision_config`.
"""

from __future__ import annotations

from vr_jax.convert.common_fields import COMMON
from vr_jax.convert.decoder_fields import QWEN2_FIELDS
from vr_jax.model_directory import FieldTable

_VIDEO = "Videos are not read here."
_NOT_READ = "transformers does not read it for this class."
_RECORD = "It records how the file came about."
_BATCHING = "It is about batches of several images in transformers."

# The ids of the tokens that stand for images and videos, which config.json has once, for the whole model.
_TOKEN_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "vision_token_id")
TEXT_FIELDS = FieldTable(
    honoured=frozenset(),
    without_meaning=dict.fromkeys(_TOKEN_IDS, "That of the whole model counts."),
).extended(QWEN2_FIELDS)
VISION_FIELDS = FieldTable(
    honoured=frozenset(
        (
            "depth",
            "hidden_size",
            "intermediate_size",
            "num_heads",
            "patch_size",
            "spatial_merge_size",
            "window_size",
            "out_hidden_size",
            "fullatt_block_indexes",
            "rope_parameters",
        )
    ),
    fixed={
        "hidden_act": ("silu",),
        "in_channels": (3,),
        "in_chans": (3,),
        "temporal_patch_size": (2,),
    },
    without_meaning={
        "tokens_per_second": _VIDEO,
        "spatial_patch_size": _NOT_READ,
    },
).extended(COMMON)
_WHOLE_FIELDS = FieldTable(
    honoured=frozenset(
        (
            "vision_config",
            "text_config",
            "image_token_id",
            "vision_start_token_id",
            "vision_end_token_id",
            "tie_word_embeddings",
        )
    ),
    without_meaning={
        "video_token_id": _VIDEO,
        "vision_token_id": _NOT_READ,
        "ignore_index": "It marks tokens without a target in training.",
    },
)
NESTED_FIELDS = _WHOLE_FIELDS.extended(
    COMMON,
    FieldTable(
        honoured=frozenset(),
        without_meaning=dict.fromkeys(sorted(TEXT_FIELDS.known), "That of text_config counts."),
    ),
)
FLAT_FIELDS = _WHOLE_FIELDS.extended(TEXT_FIELDS)

IMAGE_PROCESSOR_FIELDS = FieldTable(
    honoured=frozenset(
        (
            "image_mean",
            "image_std",
            "rescale_factor",
            "resample",
            "size",
            "min_pixels",
            "max_pixels",
            "patch_size",
            "merge_size",
            "image_processor_type",
        )
    ),
    fixed={
        "do_resize": (True,),
        "do_rescale": (True,),
        "do_normalize": (True,),
        "do_convert_rgb": (True,),
        "do_center_crop": (False,),
        "do_pad": (False,),
        "temporal_patch_size": (2,),
        "crop_size": (None,),
        "pad_size": (None,),
        "data_format": ("channels_first",),
        "input_data_format": (None,),
    },
    without_meaning={
        "default_to_square": "It says how a size of one number is read, and sizes are limits here.",
        "processor_class": "It names the class that holds the image processor.",
        "feature_extractor_type": "It names the class in old versions of transformers.",
        "image_seq_length": _NOT_READ,
        "size_divisor": _NOT_READ,
        "disable_grouping": _BATCHING,
        "device": "It chooses where transformers computes.",
        "return_tensors": "It chooses the type of arrays that transformers returns.",
        "_valid_processor_keys": "transformers 4 lists the names of its arguments there.",
        "transformers_version": _RECORD,
        **dict.fromkeys(
            ("fps", "num_frames", "min_frames", "max_frames", "do_sample_frames", "video_metadata", "return_metadata"),
            _VIDEO,
        ),
    },
)
PROCESSOR_FIELDS = FieldTable(
    honoured=frozenset(("image_processor", "chat_template")),
    without_meaning={
        "processor_class": "It names the class of the processor.",
        "video_processor": _VIDEO,
        "tokenizer": "It repeats the tokenizer's own files.",
        "auto_map": "No code of the folder is run.",
        "transformers_version": _RECORD,
    },
)
