"""Tables that settle each field of the config.json of an encoder, for each class of transformers."""

from __future__ import annotations

from vr_jax.convert.common_fields import COMMON, TRAINING
from vr_jax.model_directory import FieldTable

_SIZES = frozenset(
    (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "image_size",
        "patch_size",
        "layer_norm_eps",
    )
)
_NO_WORDS = "An encoder of images has no vocabulary."

SIGLIP_FIELDS = FieldTable(
    honoured=_SIZES,
    fixed={"hidden_act": ("gelu_pytorch_tanh",), "num_channels": (3,)},
    without_meaning={
        "vision_use_head": "The pooling head is not read; LLaVA takes hidden states.",
        "projection_dim": "It belongs to CLIP's projection, which SigLIP does not have.",
        "vocab_size": _NO_WORDS,
    },
).extended(COMMON)
SIGLIP_WHOLE_FIELDS = FieldTable(
    honoured=frozenset(("vision_config",)),
    without_meaning={
        "text_config": "SigLIP's text tower is left out.",
        "vision_config_dict": "transformers does not read it.",
        "text_config_dict": "transformers does not read it.",
    },
).extended(COMMON)
CLIP_FIELDS = FieldTable(
    honoured=_SIZES | {"hidden_act"},
    fixed={"num_channels": (3,)},
    without_meaning={
        "projection_dim": "The projection is left out; LLaVA takes hidden states.",
        "dropout": TRAINING,
        "vocab_size": _NO_WORDS,
        "tie_word_embeddings": _NO_WORDS,
    },
).extended(COMMON)
CLIP_WHOLE_FIELDS = FieldTable(
    honoured=frozenset(("vision_config", "vision_config_dict")),
    without_meaning={
        "text_config": "CLIP's text tower is left out.",
        "text_config_dict": "CLIP's text tower is left out.",
        "projection_dim": "The projection is left out; LLaVA takes hidden states.",
        "logit_scale_init_value": "It belongs to CLIP's contrastive loss.",
    },
).extended(COMMON)
