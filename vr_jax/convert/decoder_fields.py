"""Tables that settle each field of the config.json of a decoder, for each class of transformers."""

from __future__ import annotations

from vr_jax.convert.common_fields import COMMON
from vr_jax.model_directory import FieldTable

_NO_LIMIT = "Positions have no limit with the rotary embedding of this type."
_WITH_WINDOW = "It acts with use_sliding_window only."
_NOT_READ = "transformers does not read it for these classes."

_DECODER_FIELDS = FieldTable(
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
        "mlp_bias": (False,),
        "partial_rotary_factor": (1.0,),
        "use_mrope": (False,),
    },
    without_meaning={"max_position_embeddings": _NO_LIMIT, "pretraining_tp": _NOT_READ},
).extended(COMMON)
_WINDOW_FIELDS = FieldTable(
    honoured=frozenset(),
    fixed={"use_sliding_window": (False,)},
    without_meaning={"sliding_window": _WITH_WINDOW, "max_window_layers": _WITH_WINDOW},
)
# The biases of attention are those of queries, keys and values in Qwen2; the other classes would add one to the output.
QWEN2_FIELDS = FieldTable(frozenset(), fixed={"attention_bias": (True,)}).extended(_DECODER_FIELDS, _WINDOW_FIELDS)
QWEN3_FIELDS = FieldTable(frozenset(), fixed={"attention_bias": (False,)}).extended(_DECODER_FIELDS, _WINDOW_FIELDS)
LLAMA_FIELDS = FieldTable(
    frozenset(),
    fixed={"attention_bias": (False,)},
    without_meaning={"sliding_window": _NOT_READ},
).extended(_DECODER_FIELDS)
MISTRAL_FIELDS = FieldTable(
    frozenset(("sliding_window", "max_position_embeddings")),
    fixed={"attention_bias": (False,)},
).extended(_DECODER_FIELDS)
