"""The foreign checkpoint formats: the classes of each, the names of its tensors, and those that are left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from vr_jax.convert import minicpm_tables, qwen2_5_vl
from vr_jax.convert.configs import LLAVA_CLASSES
from vr_jax.convert.decoder_configs import DECODERS, DecoderFamily
from vr_jax.convert.encoder_configs import CLIP_FAMILY, ENCODERS, SIGLIP_FAMILY, EncoderFamily
from vr_jax.convert.method_tables import DEEPSTACK, LLAVA_PROJECTORS, SVA
from vr_jax.convert.tables import HEAD, TEXT, VISION_REMEMBER, Rule, Table, mlp_projector, newline, prefixed


@dataclass(frozen=True)
class Architecture:
    """A foreign format.

    Attributes:
        name: The name of the format in messages.
        holds: What a checkpoint of the format holds: an encoder, a decoder, or a whole model.
        classes: Values of `architectures` in config.json by which it is recognised, each with the values that
            `model_type` may have beside it; any may where there are none.
        model_types: Values of `model_type` by which it is recognised where `architectures` is absent.
        tables: Rules by section, with the names that export writes.
        methods: Further rules by section and by name of the method that the section chooses.
        renames: Other spellings of tensor names, by other versions of transformers or LLaVA, as pairs of a pattern and
            its replacement. They are applied in this order.
        in_memory: The names of tensors in a model of transformers 5 in memory, where they differ from those in files,
            as such pairs, of which the first that fits is applied.
        ignored: Tensors that our model has no place for, as pairs of a pattern and a description.
        encoder: The family of an encoder alone.
        decoder: The family of a decoder alone.
        text_config: The config class of transformers that the decoder has, where it belongs to no family.
        computed: Tensors that the format stores and our model computes, by name: functions of the sections of the
            model's config. Import compares them, and export writes them.
    """

    name: str
    holds: Literal["encoder", "decoder", "model"]
    classes: Mapping[str, tuple[str, ...]]
    model_types: tuple[str, ...]
    tables: Mapping[str, Table]
    methods: Mapping[str, Mapping[str, Table]] = field(default_factory=dict)
    renames: tuple[tuple[str, str], ...] = ()
    in_memory: tuple[tuple[str, str], ...] = ()
    ignored: tuple[tuple[str, str], ...] = ()
    encoder: EncoderFamily | None = None
    decoder: DecoderFamily | None = None
    text_config: str | None = None
    computed: Mapping[str, Callable[[Mapping[str, Any]], np.ndarray]] = field(default_factory=dict)

    @property
    def sections(self) -> tuple[str, ...]:
        """The sections of a model that a checkpoint of the format may hold."""
        return tuple(dict.fromkeys((*self.methods, *self.tables)))

    def table(self, sections: Iterable[str], config: Mapping[str, Any]) -> Table:
        """Returns the rules for some sections of a model.

        Args:
            sections: Names of the sections.
            config: All sections of the model's config, as dictionaries.
        """
        rules: list[Rule] = []
        for section in sections:
            rules += self.tables.get(section, ())
            if config.get(section) is not None:
                rules += self.methods.get(section, {}).get(config[section].get("name"), ())
        return tuple(rules)

    def every_rule(self, section: str) -> Table:
        """Returns the rules for a section, whatever method it chooses."""
        methods = self.methods.get(section, {}).values()
        return (*self.tables.get(section, ()), *(rule for table in methods for rule in table))


_BUFFERS = (r".*\.(position_ids|rotary_emb\.inv_freq)", "buffers that are computed, not learned")
_HEAD = (r"(.*\.)?vision_model\.head\..*", "SigLIP's pooling head; LLaVA takes hidden states")
# The modules of a tower, which some versions of transformers name without `vision_model.` before them.
_TOWER_MODULES = r"(embeddings|encoder|pre_layrnorm|post_layernorm|head)"
_TOWERS = {family.config_class.name: family.table for family in ENCODERS}


def _towers(prefix: str) -> dict[str, Table]:
    """The rules of every encoder, by its name."""
    return {name: prefixed(prefix, table) for name, table in _TOWERS.items()}


SIGLIP = Architecture(
    name="SigLIP",
    holds="encoder",
    classes=dict.fromkeys(("SiglipModel", "SiglipVisionModel"), ("siglip", "siglip_vision_model")),
    model_types=("siglip", "siglip_vision_model"),
    tables={"encoder": prefixed("vision_model.", SIGLIP_FAMILY.table)},
    renames=((rf"^{_TOWER_MODULES}\.", r"vision_model.\1."),),
    ignored=(
        _HEAD,
        _BUFFERS,
        (r"text_model\..*", "SigLIP's text tower"),
        (r"logit_(scale|bias)", "SigLIP's contrastive loss"),
    ),
    encoder=SIGLIP_FAMILY,
)
CLIP = Architecture(
    name="CLIP",
    holds="encoder",
    classes=dict.fromkeys(
        ("CLIPModel", "CLIPVisionModel", "CLIPVisionModelWithProjection"), ("clip", "clip_vision_model")
    ),
    model_types=("clip", "clip_vision_model"),
    tables={"encoder": prefixed("vision_model.", CLIP_FAMILY.table)},
    renames=((rf"^{_TOWER_MODULES}\.", r"vision_model.\1."),),
    ignored=(
        _BUFFERS,
        (r"text_model\..*", "CLIP's text tower"),
        (r"(text|visual)_projection\.weight", "CLIP's projections; LLaVA takes hidden states"),
        (r"logit_scale", "CLIP's contrastive loss"),
    ),
    encoder=CLIP_FAMILY,
)
DECODER_FORMATS = tuple(
    Architecture(
        name=family.name,
        holds="decoder",
        classes={family.model_class: (family.model_type,)},
        model_types=(family.model_type,),
        tables={"decoder": (*prefixed("model.", TEXT), *HEAD)},
        ignored=(_BUFFERS,),
        decoder=family,
    )
    for family in DECODERS
)
HF_LLAVA = Architecture(
    name="LLaVA (Hugging Face layout)",
    holds="model",
    classes={one.model_class: (one.model_type,) for one in LLAVA_CLASSES},
    model_types=tuple(one.model_type for one in LLAVA_CLASSES),
    tables={
        "decoder": (*prefixed("language_model.model.", TEXT), *prefixed("language_model.", HEAD)),
        "projector": (
            *mlp_projector("multi_modal_projector.linear_1", "multi_modal_projector.linear_2"),
            *newline("image_newline"),
        ),
    },
    methods={"encoder": _towers("vision_tower.vision_model.")},
    renames=(
        # A model of transformers 5 in memory has `model.` before every name but that of the head.
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.(vision_tower|multi_modal_projector|image_newline)", r"\1"),
        (rf"^vision_tower\.{_TOWER_MODULES}\.", r"vision_tower.vision_model.\1."),
    ),
    in_memory=(
        (r"^language_model\.model\.", "model.language_model."),
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^vision_tower\.vision_model\.", "model.vision_tower."),
        (r"^(multi_modal_projector\.|image_newline)", r"model.\1"),
    ),
    ignored=(_HEAD, _BUFFERS),
)
_TOWER = "model.vision_tower.vision_tower."
LLAVA = Architecture(
    name="LLaVA's own layout",
    holds="model",
    classes={family.llava_class: () for family in DECODERS},
    model_types=tuple(family.llava_type for family in DECODERS),
    tables={
        "decoder": (*prefixed("model.", TEXT), *HEAD),
        "projector": newline("model.image_newline"),
        "refusion": (),
    },
    methods={
        "encoder": _towers(f"{_TOWER}vision_model."),
        "projector": LLAVA_PROJECTORS,
        "refusion": {
            "deepstack": prefixed("model.", DEEPSTACK),
            "sva": prefixed("model.", SVA),
            "vision_remember": prefixed("model.vision_remember.", VISION_REMEMBER),
        },
    },
    renames=(
        (r"^mm_projector\.", "model.mm_projector."),
        (rf"^model\.vision_tower\.vision_tower\.{_TOWER_MODULES}\.", rf"{_TOWER}vision_model.\1."),
    ),
    ignored=(_HEAD, _BUFFERS),
)
QWEN2_5_VL = Architecture(
    name="Qwen2.5-VL (Hugging Face layout)",
    holds="model",
    classes={qwen2_5_vl.CLASS: (qwen2_5_vl.MODEL_TYPE,)},
    model_types=(qwen2_5_vl.MODEL_TYPE,),
    tables={"encoder": qwen2_5_vl.VISION, "projector": qwen2_5_vl.MERGER, "decoder": qwen2_5_vl.DECODER},
    renames=qwen2_5_vl.RENAMES,
    in_memory=qwen2_5_vl.IN_MEMORY,
    ignored=(_BUFFERS,),
    text_config="Qwen2_5_VLTextConfig",
)
VR_QWEN2_5_VL = Architecture(
    name="a model with Qwen2.5-VL's vision tower that transformers has no class for",
    holds="model",
    classes={qwen2_5_vl.VR_CLASS: (qwen2_5_vl.VR_MODEL_TYPE,)},
    model_types=(qwen2_5_vl.VR_MODEL_TYPE,),
    tables={"encoder": qwen2_5_vl.VISION, "decoder": qwen2_5_vl.DECODER},
    methods={"projector": qwen2_5_vl.VR_PROJECTORS, "refusion": qwen2_5_vl.VR_REFUSION},
    text_config="Qwen2_5_VLTextConfig",
)
MINICPM = Architecture(
    name="MiniCPM",
    holds="decoder",
    classes={"MiniCPMForCausalLM": ("minicpm",)},
    model_types=("minicpm",),
    tables={"decoder": (*prefixed("model.", TEXT), *HEAD)},
    ignored=(_BUFFERS,),
)
MINICPM_V = Architecture(
    name="MiniCPM-V 2.0 (layout of its remote code)",
    holds="model",
    classes={"MiniCPMV": ("minicpmv",)},
    model_types=("minicpmv",),
    tables=minicpm_tables.TABLES,
    methods=minicpm_tables.METHODS,
    ignored=(
        _BUFFERS,
        (r"vpm\.attn_pool\..*", "the pooling head of the vision tower, which MiniCPM-V replaces by nothing"),
    ),
    computed={"resampler.pos_embed": minicpm_tables.query_positions},
)
ARCHITECTURES = (SIGLIP, CLIP, *DECODER_FORMATS, HF_LLAVA, LLAVA, QWEN2_5_VL, VR_QWEN2_5_VL, MINICPM, MINICPM_V)
