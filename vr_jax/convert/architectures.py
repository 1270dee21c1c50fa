"""The foreign checkpoint formats: how each is recognised, the names of its tensors, and those that are left out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from etils import epath

from vr_jax.convert.folder import ForeignFolder, JsonFile
from vr_jax.convert.method_tables import DEEPSTACK, LLAVA_PROJECTORS, SVA
from vr_jax.convert.tables import (
    HEAD,
    TEXT,
    VISION,
    VISION_REMEMBER,
    Rule,
    Table,
    mlp_projector,
    newline,
    prefixed,
)
from vr_jax.convert.weights import PROJECTOR_FILE, Tensor
from vr_jax.errors import UserError
from vr_jax.fields import shown

# The sections of a VlmConfig that own parameters, by the beginning of their merged paths (first match counts).
SECTION_OF = (
    ("encoder.", "encoder"),
    ("projector.", "projector"),
    ("image_newline", "projector"),
    ("refusion", "refusion"),  # the blocks, and what prepares the features for them
    ("decoder.", "decoder"),
)


def section_of(path: str) -> str:
    """Returns the section of a `VlmConfig` that owns a parameter, given its merged path."""
    return next(section for prefix, section in SECTION_OF if path.startswith(prefix))


@dataclass(frozen=True)
class Architecture:
    """A foreign format.

    Attributes:
        name: The name of the format in messages.
        classes: Values of `architectures` in config.json by which it is recognised, each with the values that
            `model_type` may have beside it; any may where there are none.
        model_types: Values of `model_type` by which it is recognised where `architectures` is absent.
        tables: Rules by section, with the names that export writes.
        methods: Further rules by section and by name of the method that the section chooses.
        renames: Other spellings of tensor names, by other versions of transformers or LLaVA, as pairs of a pattern and
            its replacement. They are applied in this order.
        ignored: Tensors that our model has no place for, as pairs of a pattern and a description.
    """

    name: str
    classes: Mapping[str, tuple[str, ...]]
    model_types: tuple[str, ...]
    tables: Mapping[str, Table]
    methods: Mapping[str, Mapping[str, Table]] = field(default_factory=dict)
    renames: tuple[tuple[str, str], ...] = ()
    ignored: tuple[tuple[str, str], ...] = ()

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


_BUFFERS = (r".*\.(position_ids|rotary_emb\.inv_freq)", "buffers that are computed, not learned")
_HEAD = (r"(.*\.)?vision_model\.head\..*", "SigLIP's pooling head; LLaVA takes hidden states")

SIGLIP = Architecture(
    name="SigLIP",
    classes=dict.fromkeys(("SiglipModel", "SiglipVisionModel"), ("siglip", "siglip_vision_model")),
    model_types=("siglip", "siglip_vision_model"),
    tables={"encoder": prefixed("vision_model.", VISION)},
    renames=((r"^(embeddings|encoder|post_layernorm|head)\.", r"vision_model.\1."),),
    ignored=(
        _HEAD,
        _BUFFERS,
        (r"text_model\..*", "SigLIP's text tower"),
        (r"logit_(scale|bias)", "SigLIP's contrastive loss"),
    ),
)
QWEN2 = Architecture(
    name="Qwen2",
    classes={"Qwen2ForCausalLM": ("qwen2",)},
    model_types=("qwen2",),
    tables={"decoder": (*prefixed("model.", TEXT), *HEAD)},
    ignored=(_BUFFERS,),
)
HF_LLAVA = Architecture(
    name="LLaVA-OneVision / LLaVA-NeXT (Hugging Face layout)",
    classes={
        "LlavaOnevisionForConditionalGeneration": ("llava_onevision",),
        "LlavaNextForConditionalGeneration": ("llava_next",),
    },
    model_types=("llava_onevision", "llava_next"),
    tables={
        "encoder": prefixed("vision_tower.vision_model.", VISION),
        "decoder": (*prefixed("language_model.model.", TEXT), *prefixed("language_model.", HEAD)),
        "projector": (
            *mlp_projector("multi_modal_projector.linear_1", "multi_modal_projector.linear_2"),
            *newline("image_newline"),
        ),
    },
    renames=(
        # A model of transformers 5 in memory has `model.` before every name but that of the head.
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.(vision_tower|multi_modal_projector|image_newline)", r"\1"),
        (r"^vision_tower\.(embeddings|encoder|post_layernorm|head)\.", r"vision_tower.vision_model.\1."),
    ),
    ignored=(_HEAD, _BUFFERS),
)
_TOWER = "model.vision_tower.vision_tower."
LLAVA = Architecture(
    name="LLaVA's own layout",
    classes={"LlavaQwenForCausalLM": ()},
    model_types=("llava_qwen",),
    tables={
        "encoder": prefixed(f"{_TOWER}vision_model.", VISION),
        "decoder": (*prefixed("model.", TEXT), *HEAD),
        "projector": newline("model.image_newline"),
        "refusion": (),
    },
    methods={
        "projector": LLAVA_PROJECTORS,
        "refusion": {
            "deepstack": prefixed("model.", DEEPSTACK),
            "sva": prefixed("model.", SVA),
            "vision_remember": prefixed("model.vision_remember.", VISION_REMEMBER),
        },
    },
    renames=(
        (r"^mm_projector\.", "model.mm_projector."),
        (
            r"^model\.vision_tower\.vision_tower\.(embeddings|encoder|post_layernorm|head)\.",
            rf"{_TOWER}vision_model.\1.",
        ),
    ),
    ignored=(_HEAD, _BUFFERS),
)
ARCHITECTURES = (SIGLIP, QWEN2, HF_LLAVA, LLAVA)


# What wrappers of torch and PEFT put before the names of tensors.
_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.|_fsdp_wrapped_module\.|base_model\.model\.)+")
_LORA = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|base_layer)\.")


def recognise(folder: ForeignFolder) -> Architecture:
    """Finds the format of a checkpoint.

    `architectures` decides, since LLaVA's own checkpoints carry all kinds of `model_type`; that counts where there are
    no `architectures`. What LLaVA writes after its first stage names the language model that it began with; the fields
    of LLaVA or the only file tell it.

    Args:
        folder: The checkpoint.

    Returns:
        The format.

    Raises:
        UserError: The format is not known; the message lists those that are.
    """
    values, where = folder.config.values, folder.config.where
    classes = values.get("architectures") or []
    classes = [str(one) for one in classes] if isinstance(classes, list) else [str(classes)]
    found = next((one for one in ARCHITECTURES if set(classes) & set(one.classes)), None)
    if found is None and not classes:
        found = next((one for one in ARCHITECTURES if values.get("model_type") in one.model_types), None)
    if found is QWEN2 and (_is_llava(values) or [file.name for file in folder.checkpoint.files] == [PROJECTOR_FILE]):
        return LLAVA
    if found is not None:
        _check_model_type(found, classes, values.get("model_type"), where)
        return found
    known = ", ".join(name for architecture in ARCHITECTURES for name in architecture.classes)
    what = f"architecture {', '.join(classes)}" if classes else f"model_type {values.get('model_type')!r}"
    later = ""
    if "LlavaForConditionalGeneration" in classes or values.get("model_type") == "llava":
        later = "; LlavaForConditionalGeneration, LLaVA 1.5 with one tile and no newline, is not read yet"
    raise UserError(f"{where}: {what} is not known; known architectures: {known}{later}")


def _check_model_type(found: Architecture, classes: list[str], model_type: Any, where: str) -> None:
    """Raises UserError if `model_type`, by which transformers chooses a class, contradicts `architectures`."""
    allowed = {one for name in classes for one in found.classes.get(name, ())}
    if model_type is not None and allowed and not (isinstance(model_type, str) and model_type in allowed):
        raise UserError(
            f"{where}: model_type = {shown(model_type)} does not fit architectures = {shown(classes)}, whose "
            f"model_type is {' or '.join(sorted(map(repr, allowed)))}; write the one that the weights belong to"
        )


def _is_llava(values: Mapping[str, Any]) -> bool:
    """Returns whether a config.json has fields that only LLaVA's own code writes."""
    return any(name in values for name in ("mm_projector_type", "mm_vision_tower", "mm_vision_select_layer"))


class Source:
    """A foreign checkpoint folder, its format, and its tensors by the names of that format.

    Attributes:
        folder: What the files of the folder say.
        architecture: The format.
        checkpoint: The weight files.
        originals: The tensors' names in the weight files, by their names in the rules of the format.
        ignored: Number of tensors that are left out, by their description.
        unwrapped: Number of tensors whose names had the prefix of a wrapper.
    """

    def __init__(self, folder: ForeignFolder):
        """Finds the format and names the tensors.

        Raises:
            UserError: The format is not known, two tensors are the same parameter, or there are adapter tensors.
        """
        self.folder = folder
        self.architecture = recognise(folder)
        self.checkpoint = folder.checkpoint
        self.originals: dict[str, str] = {}
        self.ignored: Counter[str] = Counter()
        self.unwrapped = 0
        for original in self.checkpoint.tensors:
            name = _WRAPPERS.sub("", original)
            self.unwrapped += name != original
            if _LORA.search(name):
                raise UserError(
                    f"{folder.directory} holds {original}, a tensor of an adapter; merge the adapter into the weights "
                    "first (peft's merge_and_unload)"
                )
            for pattern, replacement in self.architecture.renames:
                name = re.sub(pattern, replacement, name)
            reason = next((why for pattern, why in self.architecture.ignored if re.fullmatch(pattern, name)), None)
            if reason is not None:
                self.ignored[reason] += 1
            elif name in self.originals:
                raise UserError(
                    f"{folder.directory} holds both {self.originals[name]} and {original}: the same parameter"
                )
            else:
                self.originals[name] = original

    @property
    def config(self) -> JsonFile:
        """The content of config.json."""
        return self.folder.config

    @property
    def directory(self) -> epath.Path:
        """The directory."""
        return self.folder.directory

    def tensor(self, name: str) -> Tensor:
        """Returns the description of a tensor, given its name in the rules."""
        return self.checkpoint.tensors[self.originals[name]]

    def holds(self, section: str) -> bool:
        """Returns whether any tensor of a section is there."""
        patterns = [_pattern(rule) for rule in self.architecture.tables.get(section, ())]
        return any(pattern.fullmatch(name) for pattern in patterns for name in self.originals)

    def count_layers(self, section: str) -> int:
        """Returns the number of a stack's layers that are there."""
        patterns = [_pattern(rule) for rule in self.architecture.tables[section] if "{n}" in rule.theirs]
        matches = [pattern.fullmatch(name) for pattern in patterns for name in self.originals]
        return max((int(match["n"]) + 1 for match in matches if match), default=0)


def _pattern(rule: Rule) -> re.Pattern[str]:
    """The names that a rule stands for; the group n is the index of the layer."""
    pattern = re.escape(rule.theirs).replace(r"\{n\}", r"(?P<n>\d+)").replace(r"\{i\}", r"\d+")
    return re.compile(pattern)
