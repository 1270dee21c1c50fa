"""How a foreign checkpoint is recognised, and its tensors by the names of its format (`formats`)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from vr_jax.convert.configs import text_family
from vr_jax.convert.decoder_configs import DECODERS, LLAMA_FAMILY, DecoderFamily
from vr_jax.convert.folder import ForeignFolder, JsonFile
from vr_jax.convert.formats import ARCHITECTURES, HF_LLAVA, LLAVA, Architecture
from vr_jax.convert.tables import Rule
from vr_jax.convert.weights import PROJECTOR_FILE, Tensor
from vr_jax.errors import UserError
from vr_jax.fields import shown
from vr_jax.storage import Path

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


# What wrappers of torch and PEFT put before the names of tensors.
_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.|_fsdp_wrapped_module\.|base_model\.model\.)+")
_LORA = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|base_layer)\.")

# What is said of models that are easily taken for known ones, by how their class or model_type begins in lower case
# and without underscores.
_RELATIVES = (
    ("siglip2", "this is a NaFlex SigLIP 2, which takes images of any shape; the ones of a fixed size are SiglipModel"),
    *(
        (name, "this is another model than Qwen2.5-VL; take a checkpoint of Qwen2_5_VLForConditionalGeneration")
        for name in ("qwen2vl", "qwen3vl", "qwen25omni")
    ),
    *(
        (
            name,
            "this is a LLaVA for videos; take a checkpoint of one for images, e.g. LlavaNextForConditionalGeneration",
        )
        for name in ("llavanextvideo", "videollava")
    ),
    ("minicpmo", "this is another model than MiniCPM-V 2.0; take openbmb/MiniCPM-V-2"),
)


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
    only_projector = [file.name for file in folder.checkpoint.files] == [PROJECTOR_FILE]
    if found is not None and found.holds == "decoder" and (_is_llava(values) or only_projector):
        return LLAVA
    if found is HF_LLAVA and not classes and _is_llava(values):
        return LLAVA  # whose model_type was "llava" in the beginning
    if found is not None:
        _check_model_type(found, classes, values.get("model_type"), where)
        return found
    known = ", ".join(name for architecture in ARCHITECTURES for name in architecture.classes)
    what = f"architecture {', '.join(classes)}" if classes else f"model_type {values.get('model_type')!r}"
    names = [str(one).lower().replace("_", "") for one in (*classes, values.get("model_type"))]
    hint = next((f"; {hint}" for begin, hint in _RELATIVES if any(name.startswith(begin) for name in names)), "")
    raise UserError(f"{where}: {what} is not known; known architectures: {known}{hint}")


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
        computed: The tensors' names in the weight files of `Architecture.computed`, by their names there.
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
        self.computed: dict[str, str] = {}
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
            elif name in self.architecture.computed:
                self.computed[name] = original
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
    def directory(self) -> Path:
        """The directory."""
        return self.folder.directory

    def tensor(self, name: str) -> Tensor:
        """Returns the description of a tensor, given its name in the rules."""
        return self.checkpoint.tensors[self.originals[name]]

    @property
    def decoder_family(self) -> DecoderFamily:
        """The family of the decoder that config.json describes.

        In LLaVA's own layout it follows from the class, which its first stage has of the language model alone.
        """
        if self.architecture.decoder is not None:
            return self.architecture.decoder
        values = self.config.values
        if self.architecture is HF_LLAVA:
            return text_family(values)
        classes, kind = values.get("architectures") or (), values.get("model_type")
        for family in DECODERS:
            if family.llava_class in classes or family.model_class in classes:
                return family
        by_type = [family for family in DECODERS if kind in (family.llava_type, family.model_type)]
        # "llava" is the model_type of the first LLaVA, whose decoder is a Llama.
        return by_type[0] if by_type else LLAMA_FAMILY

    def holds(self, section: str) -> bool:
        """Returns whether any tensor of a section is there."""
        patterns = [_pattern(rule) for rule in self.architecture.every_rule(section)]
        return any(pattern.fullmatch(name) for pattern in patterns for name in self.originals)

    def restrict(self, section: str) -> None:
        """Leaves out the tensors of all other sections, for a whole model of which one part is taken."""
        patterns = [_pattern(rule) for rule in self.architecture.every_rule(section)]
        kept = {
            name: original
            for name, original in self.originals.items()
            if any(pattern.fullmatch(name) for pattern in patterns)
        }
        left = len(self.originals) - len(kept) + len(self.computed)
        if left:
            self.ignored[f"the parts of the model beside its {section}"] += left
        self.originals, self.computed = kept, {}

    def count_layers(self, section: str) -> int:
        """Returns the number of a stack's layers that are there."""
        patterns = [_pattern(rule) for rule in self.architecture.every_rule(section) if "{n}" in rule.theirs]
        matches = [pattern.fullmatch(name) for pattern in patterns for name in self.originals]
        return max((int(match["n"]) + 1 for match in matches if match), default=0)


def _pattern(rule: Rule) -> re.Pattern[str]:
    """The names that a rule stands for; the group n is the index of the layer."""
    pattern = re.escape(rule.theirs).replace(r"\{n\}", r"(?P<n>\d+)").replace(r"\{i\}", r"\d+")
    return re.compile(pattern)
