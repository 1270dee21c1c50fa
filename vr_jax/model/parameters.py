"""Parameters as flat dicts of dot-joined paths, staged (as the model holds them) or merged (as disks hold them).

Staged: `decoder.stages.2.attn.q.kernel`, one leading axis for the layers of stage 2.
Merged: `decoder.layers.attn.q.kernel`, the leading axis is the layer's number in the whole decoder, so that moving an
re-fusion block, which only moves the stage bounds, does not orphan a checkpoint (design decision 1)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp

from vr_jax.model.config import VlmConfig
from vr_jax.sharding import path_of

_STAGED = re.compile(r"(?P<stack>vision|decoder)\.stages\.(?P<stage>\d+)\.(?P<rest>.+)")
_MERGED = re.compile(r"(?P<stack>vision|decoder)\.layers\.(?P<rest>.+)")


def flatten_params(module: Any) -> dict[str, Any]:
    """Every array of a module (or of its abstract tree) by its dot-joined path."""
    return {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(module)}


def unflatten_params[Module](module: Module, params: Mapping[str, Any]) -> Module:
    """`module` (abstract or not) with its arrays replaced by those of `params`.

    Raises KeyError for a path that `params` lacks."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(module)
    return jax.tree_util.tree_unflatten(structure, [params[path_of(path)] for path, _ in leaves])


def merged_path(path: str) -> str:
    """`decoder.stages.K.x` -> `decoder.layers.x`; any other path unchanged."""
    match = _STAGED.fullmatch(path)
    return f"{match['stack']}.layers.{match['rest']}" if match else path


def merge_stages(params: Mapping[str, Any]) -> dict[str, Any]:
    """Staged to merged: the stages of each stack are joined along the layer axis, in order.

    Takes arrays; for ShapeDtypeStructs run it under `jax.eval_shape`."""
    stages: dict[str, dict[int, Any]] = {}
    merged: dict[str, Any] = {}
    for path, array in params.items():
        match = _STAGED.fullmatch(path)
        if match:
            stages.setdefault(merged_path(path), {})[int(match["stage"])] = array
        else:
            merged[path] = array
    for path, parts in stages.items():
        ordered = [parts[stage] for stage in sorted(parts)]
        merged[path] = ordered[0] if len(ordered) == 1 else jnp.concatenate(ordered, axis=0)
    return merged


def split_stages(params: Mapping[str, Any], config: VlmConfig) -> dict[str, Any]:
    """Merged to staged, cut where `config` has its stage bounds; the inverse of `merge_stages`.

    Raises ValueError where the number of layers differs from the config's."""
    staged: dict[str, Any] = {}
    for path, array in params.items():
        match = _MERGED.fullmatch(path)
        if not match:
            staged[path] = array
            continue
        bounds = stage_bounds(config, match["stack"])
        if array.shape[0] != bounds[-1]:
            raise ValueError(f"{path} holds {array.shape[0]} layers, the config has {bounds[-1]}")
        for stage, (start, stop) in enumerate(pairwise(bounds)):
            part = array if len(bounds) == 2 else array[start:stop]
            staged[f"{match['stack']}.stages.{stage}.{match['rest']}"] = part
    return staged


def stage_bounds(config: VlmConfig, stack: str) -> Sequence[int]:
    return config.encoder_bounds if stack == "vision" else config.decoder_bounds
