"""The decoders that are read and written: their classes in transformers, and our fields that tell them apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vr_jax.convert.config_values import built, listed, with_defaults
from vr_jax.convert.decoder_fields import LLAMA_FIELDS, MISTRAL_FIELDS, QWEN2_FIELDS, QWEN3_FIELDS
from vr_jax.errors import UserError
from vr_jax.fields import shown
from vr_jax.model.decoders.transformer import TransformerConfig
from vr_jax.model.registry import DecoderConfig
from vr_jax.model_directory import FieldTable
from vr_jax.storage import PathLike

# The fields of transformers' configs, by our names.
_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "rms_norm_eps": "rms_norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
}
_READ = (*_NAMES.values(), "rope_theta", "rope_scaling", "rope_parameters")
_MAX_POSITIONS = 32768  # that of Qwen2's own configs; our decoder has no limit
# Fields of our decoder by which families differ, and those that no family of this file changes.
_SWITCHES = ("attention_bias", "query_key_norm")
_NEUTRAL = ("embedding_scale", "residual_scale", "logit_scale", "rope_sections")


@dataclass(frozen=True)
class DecoderFamily:
    """A decoder as transformers has it. All families name their tensors alike (`tables.TEXT`).

    Attributes:
        name: Its name in messages.
        hf_config: The name of transformers' config class.
        model_type: Its `model_type`.
        model_class: The class of transformers that holds it alone.
        llava_class: The class of a LLaVA with it in LLaVA's own layout.
        llava_type: The `model_type` of that class.
        fields: The fields of its config.json.
        switches: The values of our fields that differ from the defaults.
        head_dim: Whether a head may have other than `hidden_size / num_attention_heads` channels.
        window: Whether the field `sliding_window` acts by itself.
        fixed: Further fields that export writes.
    """

    name: str
    hf_config: str
    model_type: str
    model_class: str
    llava_class: str
    llava_type: str
    fields: FieldTable
    switches: Mapping[str, bool]
    head_dim: bool
    window: bool
    fixed: Mapping[str, Any]


QWEN2_FAMILY = DecoderFamily(
    name="Qwen2",
    hf_config="Qwen2Config",
    model_type="qwen2",
    model_class="Qwen2ForCausalLM",
    llava_class="LlavaQwenForCausalLM",
    llava_type="llava_qwen",
    fields=QWEN2_FIELDS,
    switches={},
    head_dim=False,
    window=False,
    fixed={"use_sliding_window": False},
)
QWEN3_FAMILY = DecoderFamily(
    name="Qwen3",
    hf_config="Qwen3Config",
    model_type="qwen3",
    model_class="Qwen3ForCausalLM",
    llava_class="LlavaQwen3ForCausalLM",
    llava_type="llava_qwen3",
    fields=QWEN3_FIELDS,
    switches={"attention_bias": False, "query_key_norm": True},
    head_dim=True,
    window=False,
    fixed={"use_sliding_window": False, "attention_bias": False},
)
LLAMA_FAMILY = DecoderFamily(
    name="Llama",
    hf_config="LlamaConfig",
    model_type="llama",
    model_class="LlamaForCausalLM",
    llava_class="LlavaLlamaForCausalLM",
    llava_type="llava_llama",
    fields=LLAMA_FIELDS,
    switches={"attention_bias": False},
    head_dim=True,
    window=False,
    fixed={"attention_bias": False, "mlp_bias": False},
)
MISTRAL_FAMILY = DecoderFamily(
    name="Mistral",
    hf_config="MistralConfig",
    model_type="mistral",
    model_class="MistralForCausalLM",
    llava_class="LlavaMistralForCausalLM",
    llava_type="llava_mistral",
    fields=MISTRAL_FIELDS,
    switches={"attention_bias": False},
    head_dim=True,
    window=True,
    fixed={"sliding_window": None},
)
DECODERS = (QWEN2_FAMILY, QWEN3_FAMILY, LLAMA_FAMILY, MISTRAL_FAMILY)


def decoder_family(config: DecoderConfig) -> DecoderFamily:
    """Returns the family of a decoder.

    A Mistral computes what a Llama does, and is taken for one unless its heads have a width that Llama's class refuses.

    Raises:
        UserError: No format has this decoder.
    """
    if not isinstance(config, TransformerConfig):
        raise UserError(f"there is no format for the decoder {config.name!r}, expected 'transformer'")
    plain = TransformerConfig()
    for name in _NEUTRAL:
        found, expected = getattr(config, name), getattr(plain, name)
        if found != expected:
            raise UserError(f"there is no format for a decoder with {name} = {found}, expected {expected}")
    divisible = config.hidden_size % config.num_heads == 0
    usual = divisible and config.head_dim == config.hidden_size // config.num_heads
    for family in DECODERS:
        switches = {name: family.switches.get(name, getattr(plain, name)) for name in _SWITCHES}
        fits = all(getattr(config, name) == value for name, value in switches.items())
        if fits and (usual or family.head_dim) and (divisible or family is not LLAMA_FAMILY):
            return family
    found = ", ".join(f"{name} = {getattr(config, name)}" for name in (*_SWITCHES, "head_width"))
    raise UserError(f"there is no format for a decoder with {found}; known: {', '.join(one.name for one in DECODERS)}")


def read_decoder(
    family: DecoderFamily, values: Mapping[str, Any], file: PathLike, table: FieldTable | None = None
) -> TransformerConfig:
    """Reads the config of a decoder.

    Args:
        family: Its family.
        values: A config.json of its class or of LLaVA's own layout, or the `text_config` of a LLaVA.
        file: Its path, for messages.
        table: The fields that it may have; by default those of the family.

    Raises:
        UserError: The config is not valid, or our decoder does not support it.
    """
    import transformers

    where = str(file)
    (table or family.fields).check(values, where)
    names = (*_READ, *(("head_dim",) if family.head_dim else ()))
    names = (*names, *(("sliding_window", "max_position_embeddings") if family.window else ()))
    full = with_defaults(getattr(transformers, family.hf_config), values, names, where)
    if family.window:
        _check_window(full, values, where)
    kinds = listed(values.get("layer_types"), f"{file}: layer_types")
    if kinds and len(kinds) != full.num_hidden_layers:
        raise UserError(
            f"{file}: layer_types names {len(kinds)} layers, expected as many as num_hidden_layers = "
            f"{full.num_hidden_layers}"
        )
    other = [kind for kind in kinds if kind != "full_attention"]
    if other:
        raise UserError(f"{file}: layer_types has {other[0]!r}, which is not supported, expected 'full_attention'")
    found = {ours: getattr(full, theirs) for ours, theirs in _NAMES.items()}
    found |= {**family.switches, "rope_theta": _rope_theta(full, where)}
    if family.head_dim and full.head_dim * full.num_attention_heads != full.hidden_size:
        found["head_width"] = full.head_dim
    config = built(TransformerConfig, found, where)
    if values.get("head_dim") not in (None, config.head_dim):
        raise UserError(f"{file}: head_dim = {values['head_dim']}, expected hidden_size / heads = {config.head_dim}")
    return config


def _check_window(full: Any, values: Mapping[str, Any], where: str) -> None:
    """Raises UserError if positions reach beyond a sliding window."""
    window, positions = full.sliding_window, full.max_position_embeddings
    if window is None or window >= positions:
        return
    absent = "is absent, and its class takes" if "sliding_window" not in values else "="
    raise UserError(
        f"{where}: sliding_window {absent} {window}, which acts up to max_position_embeddings = {positions}, and "
        "attention has no window here; write null into the file if the model was trained so, or if prompts and replies "
        "stay shorter than the window"
    )


def _rope_theta(full: Any, where: str) -> Any:
    """The base of the rotary frequencies of a completed config; what else it says of them is refused."""
    rope = full.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise UserError(
            f"{where}: rope type {rope['rope_type']!r} is not supported, expected 'default'; take a checkpoint whose "
            "rotary positions are not rescaled, e.g. Llama 3 in place of 3.1"
        )
    for name, value in rope.items():
        if name not in ("rope_type", "type", "rope_theta") and (name, value) != ("partial_rotary_factor", 1.0):
            raise UserError(f"{where}: rope_parameters has {name} = {shown(value)}, which is not supported; remove it")
    return rope.get("rope_theta")


def write_decoder(config: DecoderConfig) -> dict[str, Any]:
    """Returns the config.json of the class of transformers that holds a decoder alone.

    Raises:
        UserError: No format has this decoder.
    """
    family = decoder_family(config)
    assert isinstance(config, TransformerConfig)
    return {
        "architectures": [family.model_class],
        "model_type": family.model_type,
        **{theirs: getattr(config, ours) for ours, theirs in _NAMES.items()},
        **({"head_dim": config.head_dim} if family.head_dim else {}),
        "rope_theta": config.rope_theta,
        "hidden_act": "silu",
        "max_position_embeddings": _MAX_POSITIONS,
        **family.fixed,
        "use_cache": True,
    }


def default_ends(name: str) -> Any:
    """Returns the ids that end a reply where neither config.json nor generation_config.json says them.

    Args:
        name: The class of transformers that config.json is read with.
    """
    import transformers

    return getattr(transformers, name)().eos_token_id
