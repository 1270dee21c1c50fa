"""Which linear layers of a run have adapters or quantised kernels, by its settings; and the adapter that it writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vr_jax import sharding
from vr_jax.convert import write_adapter
from vr_jax.errors import ConfigError
from vr_jax.model.adaptation import (
    ADAPTER,
    KERNEL,
    LORA_A,
    LORA_B,
    QUANTISED,
    Adaptation,
    linear_kernels,
    quantisable,
)
from vr_jax.model.parameters import merge_stages, merged_path, stage_bounds
from vr_jax.model.quantization import KINDS, dequantise
from vr_jax.model.vlm import abstract_model
from vr_jax.settings import TrainConfig
from vr_jax.storage import Path
from vr_jax.training.optimizer import matches, no_match
from vr_jax.training.state import ModelTree, TrainState, mesh_of


def adapted_tree(config: TrainConfig, tree: ModelTree) -> tuple[ModelTree, tuple[str, ...]]:
    """Returns the parameters of a run, and which of them are trained.

    Args:
        config: The settings of the run.
        tree: The parameters of the plain model.

    Returns:
        The tree, which is the given one if the run needs no other; and the paths of the trained parameters, in the
        model's order: those that `config.trainable` names, without the kernels that have an adapter, and the adapters.

    Raises:
        ConfigError: A glob matches nothing that it could stand for, or nothing is there to quantise.
    """
    trainable = set(tree.trainable(config.trainable))
    kind = next((one for one in KINDS if one == config.frozen_dtype), None)
    if not config.lora.rank and kind is None:
        return tree, tuple(path for path in tree.shapes if path in trainable)
    kernels = linear_kernels(abstract_model(tree.config))
    adapted = _targets(config, tree, list(kernels)) if config.lora.rank else frozenset()
    trainable -= adapted
    quantised: frozenset[str] = frozenset()
    if kind is not None:
        quantised = frozenset(
            path for path, shape in kernels.items() if path not in trainable and quantisable(shape, kind)
        )
        if not quantised:
            raise ConfigError(
                f"config.frozen_dtype = {kind!r}: no kernel of a linear layer is frozen, so that there is nothing to "
                "quantise; set 'bfloat16', or train less (config.trainable)"
            )
    adaptation = Adaptation(
        adapted=adapted,
        rank=config.lora.rank,
        scale=config.lora.scale if config.lora.rank else 1.0,
        quantised=quantised,
        kind=kind or "int8",
    )
    found = ModelTree(tree.config, adaptation)
    return found, tuple(path for path in found.shapes if path in trainable or path.endswith(ADAPTER))


def _targets(config: TrainConfig, tree: ModelTree, kernels: list[str]) -> frozenset[str]:
    """The kernels that get an adapter."""
    for glob in config.lora.targets:
        if not any(matches(path, [glob]) for path in tree.shapes):
            raise no_match("config.lora.targets", glob, kernels, endings_only=True)
        if not any(matches(path, [glob]) for path in kernels):
            found = next(path for path in tree.shapes if matches(path, [glob]))
            raise ConfigError(
                f"config.lora.targets: {glob!r} matches no kernel that can have an adapter, only e.g. {found}; name "
                "kernels of linear layers such as decoder.*.attn.q.kernel, and train other parameters in full "
                "(config.trainable)"
            )
    return frozenset(path for path in kernels if matches(path, config.lora.targets))


def export_adapter(folder: Path, config: TrainConfig, tree: ModelTree, state: TrainState, *, owner: str = "") -> None:
    """Writes the adapter of a run in the form of PEFT.

    Args:
        folder: The folder to write.
        config: The settings of the run.
        tree: The model's parameters.
        state: The state of the training.
        owner: The identity of the run, whose older adapter is replaced.

    Raises:
        UserError: The folder cannot be written, or no format has a place for the model.
    """
    plain = ModelTree(tree.config).shapes
    trained = {path for path in state.params if not path.endswith(ADAPTER)}
    # PEFT keeps whole modules in full, so that what stands beside a trained parameter is needed too, and the same of
    # all stages of a stack, which its files count through.
    modules = {_module(merged_path(path)) for path in trained}
    needed = {path: _whole(array) for path, array in state.params.items()}
    lacking = _without_adapter(tree, plain, needed)
    for path in plain:
        adapted = path in tree.adaptation.adapted and merged_path(path) not in lacking
        if path not in needed and not adapted and _module(merged_path(path)) in modules:
            needed[path] = _of_base(path, state)
    structs = jax.eval_shape(merge_stages, dict(plain))
    params: dict[str, Any] = structs | merge_stages(needed)
    write_adapter(
        folder,
        tree.config.to_dict(),
        params,
        frozenset(merged_path(path) for path in trained),
        rank=config.lora.rank,
        alpha=config.lora.alpha,
        rslora=config.lora.rslora,
        base=config.init_from,
        owner=owner,
        lacking=lacking,
    )


def _module(path: str) -> str:
    return path.rpartition(".")[0]


def _of_base(path: str, state: TrainState) -> np.ndarray:
    """A frozen parameter on the host; of a quantised kernel, the kernel that it stands for."""
    if path in state.frozen:
        return _whole(state.frozen[path])
    codes, scales = (_whole(state.frozen[_module(path) + end]) for end in QUANTISED)
    return np.asarray(dequantise(jnp.asarray(codes), jnp.asarray(scales)))


def _without_adapter(
    tree: ModelTree, plain: Mapping[str, Any], params: dict[str, np.ndarray]
) -> dict[str, frozenset[int]]:
    """The numbers of the layers of a stack that have no adapter where others have one, by merged path of the kernel.

    Their places in the stack are filled with zeros, which are added to the parameters.
    """
    partly = {merged_path(path) for path in tree.adaptation.adapted}
    lacking: dict[str, frozenset[int]] = {}
    for path, leaf in plain.items():
        merged = merged_path(path)
        if merged not in partly or path in tree.adaptation.adapted:
            continue
        stack, _, stage, *_ = path.split(".")
        begin = stage_bounds(tree.config, stack)[int(stage)]
        layers, inputs, outputs = leaf.shape
        lacking[merged] = lacking.get(merged, frozenset()) | frozenset(range(begin, begin + layers))
        rank, stem = tree.adaptation.rank, path.removesuffix(KERNEL)
        params[stem + LORA_A] = np.zeros((layers, inputs, rank), np.float32)
        params[stem + LORA_B] = np.zeros((layers, rank, outputs), np.float32)
    return lacking


def _whole(array: jax.Array) -> np.ndarray:
    """A parameter on the host, of which each process may hold a part."""
    where = sharding.replicated(mesh_of(array))
    return np.asarray(jax.jit(lambda x: x, out_shardings=where)(array))
