"""The foreign checkpoint formats: how each is recognised, the names of its tensors, and those that are left out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from etils import epath

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
from vr_jax.convert.weights import Checkpoint, Tensor, read_json
from vr_jax.errors import UserError
from vr_jax.model_directory import FORMAT

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
        classes: Values of `architectures` in config.json by which it is recognised.
        model_types: Values of `model_type` by which it is recognised where `architectures` is absent.
        tables: Rules by section, with the names that export writes.
        methods: Further rules by section and by name of the method that the section chooses.
        renames: Other spellings of tensor names, by other versions of transformers or LLaVA, as pairs of a pattern and
            its replacement. They are applied in this order.
        ignored: Tensors that our model has no place for, as pairs of a pattern and a description.
    """

    name: str
    classes: tuple[str, ...]
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
    classes=("SiglipModel", "SiglipVisionModel"),
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
    classes=("Qwen2ForCausalLM",),
    model_types=("qwen2",),
    tables={"decoder": (*prefixed("model.", TEXT), *HEAD)},
    ignored=(_BUFFERS,),
)
HF_LLAVA = Architecture(
    name="LLaVA-OneVision / LLaVA-NeXT (Hugging Face layout)",
    classes=("LlavaOnevisionForConditionalGeneration", "LlavaNextForConditionalGeneration"),
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
    classes=("LlavaQwenForCausalLM",),
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


def recognise(values: Mapping[str, Any], file: epath.Path) -> Architecture:
    """Finds the format of a checkpoint.

    `architectures` decides, since LLaVA's own checkpoints carry all kinds of `model_type`; that counts where there are
    no `architectures`.

    Args:
        values: The content of config.json.
        file: Its path, for messages.

    Returns:
        The format.

    Raises:
        UserError: The format is not known; the message lists those that are.
    """
    classes = values.get("architectures") or []
    for architecture in ARCHITECTURES:
        if set(classes) & set(architecture.classes):
            return architecture
    if not classes:
        for architecture in ARCHITECTURES:
            if values.get("model_type") in architecture.model_types:
                return architecture
    if values.get("format") == FORMAT:
        raise UserError(f"{file.parent} is a model directory of vr_jax already; it needs no import")
    known = ", ".join(name for architecture in ARCHITECTURES for name in architecture.classes)
    found = f"architecture {', '.join(map(str, classes))}" if classes else f"model_type {values.get('model_type')!r}"
    raise UserError(f"{file}: {found} is not known; known architectures: {known}")


class Source:
    """A foreign checkpoint directory.

    Attributes:
        file: The path of config.json.
        values: The content of config.json.
        architecture: The format.
        checkpoint: The weight files.
        originals: The tensors' names in the weight files, by their names in the rules of the format.
        ignored: Number of tensors that are left out, by their description.
    """

    def __init__(self, directory: epath.Path):
        """Reads config.json and the headers of the weight files.

        Raises:
            UserError: The directory cannot be read, or its format is not known.
        """
        if not directory.is_dir():
            raise UserError(f"{directory} is not a folder of a checkpoint")
        self.file = directory / "config.json"
        self.values = read_json(self.file)
        self.architecture = recognise(self.values, self.file)
        self.checkpoint = Checkpoint(directory)
        self.originals: dict[str, str] = {}
        self.ignored: Counter[str] = Counter()
        for original in self.checkpoint.tensors:
            name = original
            for pattern, replacement in self.architecture.renames:
                name = re.sub(pattern, replacement, name)
            reason = next((why for pattern, why in self.architecture.ignored if re.fullmatch(pattern, name)), None)
            if reason is not None:
                self.ignored[reason] += 1
            elif name in self.originals:
                raise UserError(f"{directory} holds both {self.originals[name]} and {original}: the same parameter")
            else:
                self.originals[name] = original

    @property
    def directory(self) -> epath.Path:
        """The directory."""
        return self.checkpoint.directory

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
