"""The encoders that are read and written: their config.json, their tensors, and what LLaVA knows of them by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vr_jax.convert.config_values import built, known, section, with_defaults
from vr_jax.convert.encoder_fields import CLIP_FIELDS, CLIP_WHOLE_FIELDS, SIGLIP_FIELDS, SIGLIP_WHOLE_FIELDS
from vr_jax.convert.preprocessing import CLIP_CLASS, SIGLIP_CLASS, ProcessorClass
from vr_jax.convert.tables import CLIP_VISION, VISION, Table
from vr_jax.errors import UserError
from vr_jax.fields import shown
from vr_jax.model.encoders.clip import ClipConfig
from vr_jax.model.encoders.siglip import SiglipConfig
from vr_jax.model.registry import EncoderConfig
from vr_jax.model_directory import FieldTable
from vr_jax.storage import PathLike

# The fields of transformers' configs, by our names.
_NAMES = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "layer_norm_eps": "layer_norm_eps",
}


@dataclass(frozen=True)
class EncoderFamily:
    """An encoder as transformers has it.

    Attributes:
        name: Its name in messages.
        config_class: The class of our config.
        hf_config: The name of transformers' config class.
        model_type: Its `model_type`.
        model_class: The class of transformers that holds the encoder alone.
        table: The names of its tensors below `vision_model.`.
        fields: The fields of its config.json.
        whole_fields: Those of a config.json that holds it as `vision_config` beside a text tower.
        names: The fields of transformers' config, by our names.
        activations: The values of our field `activation`, each of which transformers has under the same name; empty
            for an encoder without this field.
        fixed: Further fields that export writes.
        select: What `vision_feature_select_strategy` has to be in transformers' classes of LLaVA for the patches alone.
        extra_tokens: How many tokens beside the patches its hidden states have in transformers.
        processor: The class of its image processor.
        one_tile: How that class makes one tile of an image, as `ImageConfig.aspect_ratio` has it.
    """

    name: str
    config_class: type[EncoderConfig]
    hf_config: str
    model_type: str
    model_class: str
    table: Table
    fields: FieldTable
    whole_fields: FieldTable
    names: Mapping[str, str]
    activations: tuple[str, ...]
    fixed: Mapping[str, Any]
    select: str
    extra_tokens: int
    processor: ProcessorClass
    one_tile: Literal["square", "crop"]

    @property
    def pixels(self) -> dict[str, Any]:
        """The mean and the deviation that its images are normalised with where no file says others."""
        return {"image_mean": self.processor.image_mean, "image_std": self.processor.image_std}


SIGLIP_FAMILY = EncoderFamily(
    name="SigLIP",
    config_class=SiglipConfig,
    hf_config="SiglipVisionConfig",
    model_type="siglip_vision_model",
    model_class="SiglipVisionModel",
    table=VISION,
    fields=SIGLIP_FIELDS,
    whole_fields=SIGLIP_WHOLE_FIELDS,
    names=_NAMES,
    activations=(),
    fixed={"hidden_act": "gelu_pytorch_tanh", "num_channels": 3, "vision_use_head": False},
    select="full",
    extra_tokens=0,
    processor=SIGLIP_CLASS,
    one_tile="square",
)
CLIP_FAMILY = EncoderFamily(
    name="CLIP",
    config_class=ClipConfig,
    hf_config="CLIPVisionConfig",
    model_type="clip_vision_model",
    model_class="CLIPVisionModel",
    table=CLIP_VISION,
    fields=CLIP_FIELDS,
    whole_fields=CLIP_WHOLE_FIELDS,
    names={**_NAMES, "activation": "hidden_act"},
    activations=("quick_gelu", "gelu"),
    fixed={"num_channels": 3},
    select="default",
    extra_tokens=1,
    processor=CLIP_CLASS,
    one_tile="crop",
)
ENCODERS = (SIGLIP_FAMILY, CLIP_FAMILY)
# LLaVA's config.json names its encoder and does not describe it.
TOWERS: dict[str, EncoderConfig] = {
    **{
        f"google/siglip-base-patch16-{size}": SiglipConfig(
            hidden_size=768, intermediate_size=3072, num_layers=12, num_heads=12, image_size=size
        )
        for size in (224, 256, 384, 512)
    },
    **{f"google/siglip-large-patch16-{size}": SiglipConfig(image_size=size) for size in (256, 384)},
    **{
        f"google/siglip-so400m-patch14-{size}": SiglipConfig(
            hidden_size=1152,
            intermediate_size=4304,
            num_layers=27,
            num_heads=16,
            image_size=size,
            patch_size=14,
        )
        for size in (224, 384)
    },
    "openai/clip-vit-large-patch14-336": ClipConfig(),
    "openai/clip-vit-large-patch14": ClipConfig(image_size=224),
    **{
        f"openai/clip-vit-base-patch{patch}": ClipConfig(
            hidden_size=768, intermediate_size=3072, num_layers=12, num_heads=12, image_size=224, patch_size=patch
        )
        for patch in (16, 32)
    },
}


def encoder_family(config: EncoderConfig) -> EncoderFamily:
    """Returns the family of an encoder.

    Raises:
        UserError: No format has this encoder.
    """
    for family in ENCODERS:
        if isinstance(config, family.config_class):
            return family
    expected = " or ".join(repr(family.config_class.name) for family in ENCODERS)
    raise UserError(f"there is no format for the encoder {config.name!r}, expected {expected}")


def read_encoder(family: EncoderFamily, values: Mapping[str, Any], file: PathLike) -> EncoderConfig:
    """Reads the config of an encoder.

    Args:
        family: Its family.
        values: A config.json of an encoder alone or with its text tower, or the `vision_config` of a LLaVA.
        file: Its path, for messages.

    Raises:
        UserError: The config is not valid, or our encoder does not support it.
    """
    import transformers

    hf_config, where = getattr(transformers, family.hf_config), str(file)
    if "vision_config" in values:
        family.whole_fields.check(values, where)
        values, where = _inner_config(family, values, file), f"{file}: vision_config"
    family.fields.check(values, where)
    full = with_defaults(hf_config, values, family.names.values(), where)
    found = {ours: getattr(full, theirs) for ours, theirs in family.names.items()}
    for name in ("image_size", "patch_size"):
        if isinstance(found[name], list | tuple):
            if len(set(found[name])) != 1:
                raise UserError(f"{where}: {name} = {shown(found[name])} is not supported, expected a square")
            found[name] = found[name][0]
    if family.activations and found["activation"] not in family.activations:
        expected = " or ".join(map(repr, family.activations))
        raise UserError(f"{where}: hidden_act = {shown(found['activation'])} is not supported, expected {expected}")
    return built(family.config_class, found, where)


def _inner_config(family: EncoderFamily, values: Mapping[str, Any], file: PathLike) -> Mapping[str, Any]:
    """The fields of the encoder in a config.json that also describes a text tower."""
    import transformers

    inner = section(values, "vision_config", file)
    changes = section(values, "vision_config_dict", file)
    if not changes or "vision_config_dict" not in family.whole_fields.honoured:
        return inner
    # CLIP's class lets this older field, completed by its defaults, override the newer one.
    family.fields.check(inner, f"{file}: vision_config")
    family.fields.check(changes, f"{file}: vision_config_dict")
    hf_config = getattr(transformers, family.hf_config)
    full = with_defaults(hf_config, changes, family.names.values(), f"{file}: vision_config_dict")
    return known(full.to_dict(), family.fields)


def write_encoder(config: EncoderConfig) -> dict[str, Any]:
    """Returns the config.json of the class of transformers that holds an encoder alone.

    Raises:
        UserError: No format has this encoder.
    """
    family = encoder_family(config)
    return {
        "architectures": [family.model_class],
        "model_type": family.model_type,
        **{theirs: getattr(config, ours) for ours, theirs in family.names.items()},
        **family.fixed,
    }
