"""`adapter_config.json`: what a PEFT folder says about its LoRA adapter (docs/convert.md#adapters).

Every field is read, or has the value that is computed here, or is on a list of fields without a meaning here, or is
refused by its name. The names and defaults are those of peft 0.21, `tuners/lora/config.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vr_jax.errors import UserError
from vr_jax.fields import shown
from vr_jax.model_directory import FieldTable, read_json
from vr_jax.storage import Path

ADAPTER_CONFIG = "adapter_config.json"
_RECORD = "It records how the file came about."
_TRAINING = "It acts while the adapter is trained."
_INITIAL = "It chooses initial values of the adapter, which the file holds trained."

ADAPTER_TABLE = FieldTable(
    honoured=frozenset(
        (
            "peft_type",
            "r",
            "lora_alpha",
            "use_rslora",
            "rank_pattern",
            "alpha_pattern",
            "target_modules",
            "exclude_modules",
            "layers_to_transform",
            "layers_pattern",
            "modules_to_save",
        )
    ),
    fixed={
        "fan_in_fan_out": (False,),
        "bias": ("none",),
        "use_dora": (False,),
        "lora_bias": (False,),
        # Other ways to begin change the weights of the base too, e.g. "pissa".
        "init_lora_weights": (True, False, "gaussian", "eva"),
        "loftq_config": ({},),
        "corda_config": (None,),
        "lora_ga_config": (None,),
        "use_qalora": (False,),
        "layer_replication": ([],),
        "trainable_token_indices": ([], {}),
        "target_parameters": ([],),
        "alora_invocation_tokens": ([],),
        "megatron_config": ({},),
        "use_bdlora": (False,),
        "arrow_config": (None,),
        "kasa_config": (None,),
        "monteclora_config": (None,),
        "ensure_weight_tying": (False,),
    },
    without_meaning={
        **dict.fromkeys(
            ("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version"),
            _RECORD,
        ),
        **dict.fromkeys(("lora_dropout", "velora_config", "runtime_config"), _TRAINING),
        "eva_config": _INITIAL,
        "megatron_core": "It names the library of megatron_config.",
        "qalora_group_size": "It belongs to use_qalora.",
    },
)


@dataclass(frozen=True)
class AdapterConfig:
    """The fields of adapter_config.json that are honoured.

    Attributes:
        where: The path of the file, for messages.
        fields: The names of all fields of the file, also of those that are ignored.
        rank: `r`, the rank of modules that `rank_pattern` does not name.
        alpha: `lora_alpha`, in the same way.
        rslora: Whether the scale is alpha / sqrt(rank) instead of alpha / rank.
        rank_pattern: Ranks by patterns of module names.
        alpha_pattern: Alphas by patterns of module names.
        targets: The names of modules with an adapter, or a pattern of them.
        excluded: The names, or a pattern, of modules that have none nevertheless.
        layers: The numbers of the layers that have adapters; None for all.
        layers_pattern: The names of the lists that these numbers count in; none for any.
        saved: The names of modules whose parameters the file holds in full.
    """

    where: str
    fields: frozenset[str]
    rank: int
    alpha: float
    rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    targets: str | Sequence[str]
    excluded: str | Sequence[str]
    layers: Sequence[int] | None
    layers_pattern: Sequence[str]
    saved: Sequence[str]

    def rank_of(self, module: str) -> int:
        """Returns the rank of a module's adapter."""
        return int(_by_pattern(self.rank_pattern, module, self.rank))

    def scale_of(self, module: str) -> float:
        """Returns what the product of a module's matrices is multiplied by."""
        rank, alpha = self.rank_of(module), _by_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / (rank**0.5 if self.rslora else rank)

    def names(self, module: str) -> bool:
        """Returns whether a module has an adapter (peft `tuners/tuners_utils.py`, `check_target_module_exists`)."""
        if _listed(self.excluded, module) or not (self.targets == "all-linear" or _listed(self.targets, module)):
            return False
        if self.layers is None or isinstance(self.targets, str):
            return True
        patterns = self.layers_pattern or (r"[^.]*",)
        found = next((m for one in patterns if (m := re.match(rf"(?:^|.*?\.){one}\.(\d+)\.", module))), None)
        return found is not None and int(found[1]) in self.layers

    def saves(self, module: str) -> bool:
        """Returns whether the file holds the parameters of a module in full."""
        return any(module == name or module.endswith(f".{name}") or f".{name}." in f".{module}." for name in self.saved)


def _listed(names: str | Sequence[str], module: str) -> bool:
    if isinstance(names, str):
        return bool(names) and re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _by_pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    """The value of the first pattern that the end of a module's name matches (peft `utils/other.py`)."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def read_adapter_config(directory: Path, ignored: Sequence[str] = ()) -> AdapterConfig:
    """Reads adapter_config.json.

    Args:
        directory: The folder of the adapter.
        ignored: Names of fields that are left out of consideration.

    Raises:
        UserError: The file is missing or damaged, is not of LoRA, or says what is not computed here.
    """
    path = directory / ADAPTER_CONFIG
    content = read_json(path)
    values = {name: value for name, value in content.items() if name not in ignored}
    where = str(path)
    ADAPTER_TABLE.check(values, where)
    if values.get("peft_type") != "LORA":
        raise UserError(f"{where}: peft_type = {shown(values.get('peft_type'))}: only adapters of LoRA can be imported")
    layers = _typed(values, where, "layers_to_transform", (int, list), "a number of a layer, or a list of them")
    patterns = _typed(values, where, "layers_pattern", (str, list), "the name of a list of layers, or several")
    found = AdapterConfig(
        where=where,
        fields=frozenset(content),
        rank=_typed(values, where, "r", (int,), "a positive integer", 8),
        alpha=_typed(values, where, "lora_alpha", (int, float), "a number", 8),
        rslora=_typed(values, where, "use_rslora", (bool,), "true or false", False),
        rank_pattern=_typed(values, where, "rank_pattern", (dict,), "ranks by patterns of names", {}),
        alpha_pattern=_typed(values, where, "alpha_pattern", (dict,), "numbers by patterns of names", {}),
        targets=_typed(values, where, "target_modules", (str, list), "names of modules, or a pattern of them", ()),
        excluded=_typed(values, where, "exclude_modules", (str, list), "names of modules, or a pattern of them", ()),
        layers=[layers] if isinstance(layers, int) else layers or None,
        layers_pattern=[patterns] if isinstance(patterns, str) and patterns else patterns or (),
        saved=_typed(values, where, "modules_to_save", (list,), "names of modules", ()),
    )
    ranks, alphas = (found.rank, *found.rank_pattern.values()), (found.alpha, *found.alpha_pattern.values())
    if not all(_is_number(one) and isinstance(one, int) and one > 0 for one in ranks):
        raise UserError(f"{where}: r and rank_pattern = {shown(list(ranks))}: expected positive integers")
    if not all(_is_number(one) and _is_finite(one) for one in alphas):
        raise UserError(f"{where}: lora_alpha and alpha_pattern = {shown(list(alphas))}: expected finite numbers")
    named: list[Any] = [*(part for part in (found.targets, found.excluded) if not isinstance(part, str))]
    if not all(isinstance(name, str) for part in (*named, found.saved, found.layers_pattern) for name in part):
        raise UserError(f"{where}: target_modules, exclude_modules, layers_pattern and modules_to_save hold names only")
    if found.layers is not None and not all(_is_number(one) and isinstance(one, int) for one in found.layers):
        raise UserError(f"{where}: layers_to_transform = {shown(found.layers)}: expected numbers of layers")
    patterns_of = [part for part in (found.targets, found.excluded) if isinstance(part, str)]
    for pattern in (*patterns_of, *found.rank_pattern, *found.alpha_pattern, *found.layers_pattern):
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"{where}: {pattern!r} is no pattern of names: {error}") from error
    return found


def _typed(
    values: Mapping[str, Any], where: str, name: str, types: tuple[type, ...], expected: str, default: Any = None
) -> Any:
    """A field of one of some types; None and an absent field stand for the default."""
    value = values.get(name)
    if value is None:
        return default
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise UserError(f"{where}: {name} = {shown(value)}: expected {expected}")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_finite(value: float) -> bool:
    """Returns whether a number of a JSON file, which may be NaN, infinite or a whole number of any size, is finite."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
