"""Parameters as flat dictionaries by path, staged as the model holds them or merged as files hold them.

Staged paths are `decoder.stages.2.attn.q.kernel`, with one leading axis for the layers of stage 2. Merged paths are
`decoder.layers.attn.q.kernel`, whose leading axis is the layer's number in the whole decoder. Moving a re-fusion block
moves only the bounds of the stages, so files hold merged parameters (docs/design/decisions.md#decision-1).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vr_jax.model.config import VlmConfig
from vr_jax.sharding import path_of

_STAGED = re.compile(r"(?P<stack>encoder|decoder)\.stages\.(?P<stage>\d+)\.(?P<rest>.+)")
_MERGED = re.compile(r"(?P<stack>encoder|decoder)\.layers\.(?P<rest>.+)")


def flatten_params(module: Any) -> dict[str, Any]:
    """Every array of a module, or of its abstract tree, by its dot-joined path."""
    return {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(module)}


def unflatten_params[Module](module: Module, params: Mapping[str, Any]) -> Module:
    """A module with its arrays replaced.

    Args:
        module: The module, or its abstract tree.
        params: The new arrays by path.

    Raises:
        KeyError: `params` lacks a path of the module.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(module)
    filled: Module = jax.tree_util.tree_unflatten(structure, [params[path_of(path)] for path, _ in leaves])
    return filled


def merged_path(path: str) -> str:
    """The merged form of a staged path; any other path stays as it is."""
    match = _STAGED.fullmatch(path)
    return f"{match['stack']}.layers.{match['rest']}" if match else path


def merge_stages(params: Mapping[str, Any]) -> dict[str, Any]:
    """Joins the stages of each stack along the layer axis.

    Args:
        params: Arrays by staged path. For ShapeDtypeStructs run the function under `jax.eval_shape`.

    Returns:
        Arrays by merged path. Those of numpy stay on the host.
    """
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
        on_host = all(isinstance(part, np.ndarray) for part in ordered)
        join = np.concatenate if on_host else jnp.concatenate
        merged[path] = ordered[0] if len(ordered) == 1 else join(ordered, axis=0)
    return merged


def split_stages(params: Mapping[str, Any], config: VlmConfig) -> dict[str, Any]:
    """Cuts merged parameters at the bounds of a config's stages; the inverse of `merge_stages`.

    Args:
        params: Arrays by merged path.
        config: The model.

    Returns:
        Arrays by staged path.

    Raises:
        ValueError: The number of layers differs from the config's.
    """
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


def stage_bounds(config: VlmConfig, stack: str) -> tuple[int, ...]:
    """The bounds of the stages of a stack, "encoder" or "decoder"."""
    return config.encoder_bounds if stack == "encoder" else config.decoder_bounds
