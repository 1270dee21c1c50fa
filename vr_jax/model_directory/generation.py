"""`generation_config.json`: what a model directory says about the choice of tokens, as transformers understands it.

The commands decode greedily unless a temperature is given. What changes greedy decoding is read or refused; what only
concerns sampling, beams or the speed has no meaning here (docs/design/decisions.md#decision-29).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from vr_jax.errors import ConfigError, UserError
from vr_jax.fields import Config, NonNegativeInt, PositiveFloat, PositiveInt
from vr_jax.model_directory.field_table import FieldTable
from vr_jax.model_directory.json_files import is_there, read_json
from vr_jax.storage import Path, PathLike, as_path

GENERATION_FILE = "generation_config.json"
MESSAGE_END = "<|im_end|>"  # of ChatML
_TOKENIZER_FILE = "tokenizer.json"
_SAMPLING = "It shapes sampling; the commands decode greedily, or sample as --temperature and --top_p say."
_BEAMS = "It compares beams, and there is one."
_OUTPUT = "It chooses what `generate` of transformers returns beside the tokens."
_SPEED = "It changes how transformers computes the tokens, not which ones."
_ASSISTED = "It belongs to assisted decoding, whose greedy tokens are those of the model."
_RECORD = "It records how the file came about."

GENERATION_TABLE = FieldTable(
    honoured=frozenset(
        (
            "eos_token_id",
            "repetition_penalty",
            "min_new_tokens",
            "max_new_tokens",
            "suppress_tokens",
            "begin_suppress_tokens",
            "do_sample",
        )
    ),
    fixed={
        "num_beams": (1,),
        "num_beam_groups": (1,),
        "num_return_sequences": (1,),
        "min_length": (0,),
        "max_time": (None,),
        "stop_strings": (None, [], ""),
        "no_repeat_ngram_size": (0,),
        "encoder_no_repeat_ngram_size": (0,),
        "encoder_repetition_penalty": (1.0,),
        "bad_words_ids": (None, []),
        "force_words_ids": (None, []),
        "constraints": (None, []),
        "forced_bos_token_id": (None,),
        "forced_eos_token_id": (None,),
        "sequence_bias": (None, {}, []),
        "exponential_decay_length_penalty": (None,),
        "guidance_scale": (None, 1.0),
        "penalty_alpha": (None, 0.0),
        "dola_layers": (None,),
        "token_healing": (None, False),
        "watermarking_config": (None,),
        "use_mtp": (None, False),
        "prompt_lookup_num_tokens": (None,),
        "assistant_early_exit": (None,),
        "custom_generate": (None,),
    },
    without_meaning={
        **dict.fromkeys(
            ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"), _SAMPLING
        ),
        **dict.fromkeys(("length_penalty", "early_stopping", "diversity_penalty", "low_memory"), _BEAMS),
        **dict.fromkeys(
            ("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
            _OUTPUT,
        ),
        **dict.fromkeys(
            (
                "use_cache",
                "cache_implementation",
                "cache_config",
                "max_cache_len",
                "compile_config",
                "disable_compile",
                "prefill_chunk_size",
                "continuous_batching_config",
                "return_legacy_cache",
            ),
            _SPEED,
        ),
        **dict.fromkeys(
            (
                "is_assistant",
                "num_assistant_tokens",
                "num_assistant_tokens_schedule",
                "assistant_confidence_threshold",
                "max_matching_ngram_size",
                "assistant_lookbehind",
                "target_lookbehind",
                "assistant_ensemble_weight",
                "speculation_type",
            ),
            _ASSISTED,
        ),
        **dict.fromkeys(("transformers_version", "_from_model_config", "_commit_hash"), _RECORD),
        "max_length": "It is overridden by max_new_tokens, which every command sets.",
        "pad_token_id": "It fills rows after their end, which is cut off.",
        "bos_token_id": "It begins an empty prompt, and there is none.",
        "decoder_start_token_id": "It belongs to encoder-decoder models.",
        "renormalize_logits": "It adds one number to all logits of a token, so that the order stays.",
        "remove_invalid_values": "It replaces logits that are not finite, which a sound model has none of.",
        "chat_format": "A field of the first Qwen that transformers does not read.",
        "max_window_size": "A field of the first Qwen that transformers does not read.",
        "trust_remote_code": "No code of the folder is run.",
    },
)


@dataclass(frozen=True, kw_only=True)
class GenerationSettings(Config):
    """How replies are generated unless flags say otherwise.

    Attributes:
        eos_token_ids: Each of these tokens ends a reply. When empty, the tokens do that end one in the model's chat
            format.
        repetition_penalty: Logits of tokens that occurred are divided by it where they are positive, and multiplied
            where they are negative.
        min_new_tokens: The tokens that end a reply are not chosen before it has this many tokens.
        max_new_tokens: The longest reply, in tokens, or None for what the command takes.
        suppress_tokens: Tokens that are never chosen.
        begin_suppress_tokens: Tokens that are not chosen first.
        do_sample: Whether transformers would sample. The commands decode greedily without `--temperature`.
    """

    eos_token_ids: tuple[NonNegativeInt, ...] = ()
    repetition_penalty: PositiveFloat = 1.0
    min_new_tokens: NonNegativeInt = 0
    max_new_tokens: PositiveInt | None = None
    suppress_tokens: tuple[NonNegativeInt, ...] = ()
    begin_suppress_tokens: tuple[NonNegativeInt, ...] = ()
    do_sample: bool = False

    @classmethod
    def from_foreign(cls, values: Mapping[str, Any], where: str) -> GenerationSettings:
        """Reads the fields of a generation_config.json.

        Args:
            values: The fields.
            where: The path of the file, for messages.

        Raises:
            UserError: A field is not known, is refused, or has a wrong value.
        """
        GENERATION_TABLE.check(values, where)
        given = {name: value for name, value in values.items() if name in GENERATION_TABLE.honoured}
        found = {name: value for name, value in given.items() if value is not None}
        if "eos_token_id" in found:
            ids = found.pop("eos_token_id")
            found["eos_token_ids"] = ids if isinstance(ids, list) else [ids]
        try:
            return cls.from_dict(found, where)
        except ConfigError as error:
            raise UserError(str(error).replace(".eos_token_ids", ".eos_token_id", 1)) from None

    def check_vocabulary(self, size: int, where: str) -> None:
        """Checks that the ids of tokens lie in the vocabulary.

        Raises:
            UserError: One does not; the message names the field.
        """
        for name in ("suppress_tokens", "begin_suppress_tokens"):
            outside = [number for number in getattr(self, name) if number >= size]
            if outside:
                raise UserError(f"{where}: {name} has the ids {outside}, expected ids below the vocabulary's {size}")


def read_generation(directory: PathLike) -> GenerationSettings:
    """Reads the generation_config.json of a folder; without one, the defaults hold.

    Raises:
        UserError: The file cannot be read, or has a field that is refused.
    """
    path = as_path(directory) / GENERATION_FILE
    if not is_there(path):
        return GenerationSettings()
    return GenerationSettings.from_foreign(read_json(path), str(path))


def generation_of_chat(directory: PathLike, end_token: str = MESSAGE_END) -> dict[str, Any] | None:
    """Returns the fields of generation_config.json, with the end of a reply in the chat format among the end tokens.

    Args:
        directory: A folder with the files of a tokenizer.
        end_token: The token that ends a reply in the model's chat format.

    Returns:
        The fields, or None where the folder has no such file, so that the ends of the chat format hold anyway.

    Raises:
        UserError: A file cannot be read, or has a field that is refused.
    """
    path, tokenizer = as_path(directory) / GENERATION_FILE, as_path(directory) / _TOKENIZER_FILE
    if not is_there(path):
        return None
    values = read_json(path)
    ids = GenerationSettings.from_foreign(values, str(path)).eos_token_ids
    end = token_ids(tokenizer).get(end_token) if tokenizer.exists() else None
    if not ids or end is None or end in ids:
        return values
    return {**values, "eos_token_id": [end, *ids]}


def token_ids(path: Path) -> dict[str, int]:
    """Returns the ids of all tokens of a tokenizer.json by their text.

    Raises:
        UserError: It cannot be read, or has no vocabulary.
    """
    values = read_json(path)
    model = values.get("model")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocabulary, Mapping):
        ids = dict(vocabulary)
    elif isinstance(vocabulary, list):
        ids = {one[0]: number for number, one in enumerate(vocabulary)}
    else:
        raise UserError(f"{path} has no vocabulary in its field 'model'")
    added = values.get("added_tokens")
    return ids | {one["content"]: one["id"] for one in (added if isinstance(added, list) else ())}


def kept_fields(values: Mapping[str, Any], ignored: Collection[str]) -> dict[str, Any]:
    """Returns the fields of a JSON object that are not to be ignored."""
    return {name: value for name, value in values.items() if name not in ignored}
