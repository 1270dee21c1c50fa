"""The fields that every config.json of transformers may have, and what is done with each (`FieldTable`)."""

from __future__ import annotations

from vr_jax.model_directory import GENERATION_TABLE, FieldTable

_RECORD = "It records how the file came about."
_TYPE = "Each tensor keeps the type that it is stored in."
TRAINING = "It acts in training only."
_OUTPUT = "It chooses what the model of transformers returns beside its result."
_TASK = "It belongs to classification."
_OTHER_DECODER = "It belongs to encoder-decoder models."
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
COMMON = FieldTable(
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
        **dict.fromkeys(("initializer_range", "initializer_factor", "attention_dropout"), TRAINING),
        "chunk_size_feed_forward": "It cuts the computation into pieces and changes no result.",
        "use_cache": "It changes how transformers computes the tokens, not which ones.",
        "tokenizer_class": "The tokenizer's own files name its class.",
        "sep_token_id": "transformers does not read it for these classes.",
        "prefix": "transformers does not read it for these classes.",
        "tf_legacy_loss": "It belongs to TensorFlow.",
        "auto_map": "No code of the folder is run.",
    },
).extended(_OLD_GENERATION)
