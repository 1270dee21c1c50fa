"""Reading model directories: whole models, parts of one, and warm starts that combine several."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx, traverse_util
from jax.sharding import Mesh, SingleDeviceSharding
from jax.typing import DTypeLike

from vr_jax.errors import UserError, message_list
from vr_jax.model.config import VlmConfig
from vr_jax.model.parameters import flatten_params, merge_stages, split_stages, unflatten_params
from vr_jax.model.vlm import VisionLanguageModel, abstract_model
from vr_jax.model_directory.comparison import config_differences
from vr_jax.model_directory.layout import PARAMS_FOLDER, orbax_errors, params_folder, read_config, read_sections
from vr_jax.sharding import param_shardings
from vr_jax.storage import PathLike

type DTypeOf = DTypeLike | Callable[[str], DTypeLike] | None


@dataclass(frozen=True)
class WarmStart:
    """Where the parameters of a warm-started model came from, as paths of the merged layout.

    Attributes:
        loaded: Parameters that a directory held.
        initialised: Parameters that no directory held.
        unused: Stored parameters that the model does not have, and that were allowed to be left out.
    """

    loaded: tuple[str, ...]
    initialised: tuple[str, ...]
    unused: tuple[str, ...]


def load_model(
    directory: PathLike,
    mesh: Mesh | None = None,
    config: VlmConfig | None = None,
    *,
    dtype: DTypeOf = None,
) -> VisionLanguageModel:
    """Loads a whole model, each parameter straight into its shards.

    Args:
        directory: A model directory.
        mesh: The devices; None loads onto the first local device.
        config: A config to use in place of the saved one, e.g. with re-fusion blocks elsewhere or another type of the
            activations. Every parameter of it must be stored, and every stored one must be used.
        dtype: Type of the parameters, or a function from a merged path to it; None keeps the type that each is stored
            in.

    Returns:
        The model.

    Raises:
        UserError: The directory cannot be read, or its parameters do not fit; the message names each one that is
            missing, unused or of another shape.
    """
    config = config or read_config(directory)
    # Without unpad no newline is ever read, and LLaVA's stage-1 checkpoints have none.
    optional = () if config.image.unpad else ("image_newline",)
    if dtype is None:
        stored = {path: leaf.dtype for path, leaf in stored_params(directory).items()}
        dtype = lambda path: stored.get(path, jnp.float32)  # noqa: E731
    # The caller chose the config, and may choose another one than the saved one.
    model, report = warm_start([directory], config, mesh, dtype=dtype, allow_different=("",))
    missing = [path for path in report.initialised if path not in optional]
    if missing:
        title = f"{directory} lacks {len(missing)} parameters of the config; is it a directory of this model?"
        raise UserError(message_list(title, missing))
    return model


def warm_start(
    directories: Sequence[PathLike],
    config: VlmConfig,
    mesh: Mesh | None = None,
    *,
    dtype: DTypeOf = None,
    seed: int = 0,
    allow_unused: Sequence[str] = (),
    allow_different: Sequence[str] = (),
) -> tuple[VisionLanguageModel, WarmStart]:
    """Makes a model of the parameters that some directories hold, and initialises the others.

    Phase 2 starts so from phase 1, phase 1 from an encoder and a decoder, and LLaVA-VR from a LLaVA. What is
    initialised is what `VisionLanguageModel(config, rngs=nnx.Rngs(seed))` would hold.

    Args:
        directories: Model directories of whole models or of parts; none initialises everything.
        config: The config of the model.
        mesh: The devices; None takes the first local device.
        dtype: Type of the parameters, or a function from a merged path to it; None keeps the model's own (float32).
        seed: Seed of the initial values.
        allow_unused: Beginnings of the paths of stored parameters that the model may lack, e.g. "refusion".
        allow_different: Beginnings of the names of fields, e.g. "projector.stride", that the config may give other
            values than the directories have for the sections that are taken from them.

    Returns:
        The model, and where its parameters came from.

    Raises:
        UserError: A directory cannot be read, or parameters do not fit (the message names each one that is unused, of
            another shape or in two directories), or the config differs from that of a directory (the message names each
            field and both values).
    """
    abstract = abstract_model(config)
    shapes = jax.eval_shape(merge_stages, flatten_params(abstract))
    wanted = {path: _target(path, leaf, mesh, dtype) for path, leaf in shapes.items()}
    merged: dict[str, jax.Array] = {}
    unused: list[str] = []
    problems: list[str] = []
    different: list[str] = []
    for directory in directories:
        stored = stored_params(directory)
        unused += [path for path in stored if path not in wanted]
        problems += _misfits(os.fspath(directory), stored, wanted, merged, tuple(allow_unused))
        taken = [path for path in stored if path in wanted]
        found = config_differences(read_sections(directory), config, taken, allow_different)
        different += [f"{directory}: {line}" for line in found]
        if not problems and not different:
            merged |= load_params(directory, {path: wanted[path] for path in stored if path in wanted})
    if problems:
        title = (
            "the parameters do not fit the config; set the sections of config.model to those in config.json of the "
            "directory, or name the beginnings of paths that the model may leave unused in config.allow_unused:"
        )
        raise UserError(message_list(title, problems))
    if different:
        title = (
            "the config differs from that of the directories whose parameters it takes; set these fields of "
            "config.model, or name those that may differ in config.allow_different:"
        )
        raise UserError(message_list(title, different))
    loaded, fresh = tuple(merged), [path for path in wanted if path not in merged]
    if fresh:
        merged |= _initialise(config, seed, {path: wanted[path] for path in fresh})
    staged: dict[str, jax.Array] = {}
    for path in list(merged):  # Split one at a time, so that only one parameter exists twice.
        staged |= split_stages({path: merged.pop(path)}, config)
    report = WarmStart(loaded=loaded, initialised=tuple(fresh), unused=tuple(unused))
    return unflatten_params(abstract, staged), report


def _misfits(
    directory: str,
    stored: Mapping[str, jax.ShapeDtypeStruct],
    wanted: Mapping[str, jax.ShapeDtypeStruct],
    merged: Mapping[str, jax.Array],
    allow_unused: tuple[str, ...],
) -> list[str]:
    """One line for each stored parameter that the model cannot take."""
    problems = []
    for path, leaf in stored.items():
        if path not in wanted:
            if not path.startswith(allow_unused):
                problems.append(f"{path} {leaf.shape} of {directory}: unused, the config has no such parameter")
        elif leaf.shape != wanted[path].shape:
            problems.append(f"{path} of {directory}: found {leaf.shape}, expected {wanted[path].shape}")
        if path in merged:
            problems.append(f"{path} of {directory}: another directory has it too")
    return problems


def stored_params(directory: PathLike) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shape and type of every stored parameter by merged path, without reading an array.

    Raises:
        UserError: The directory is not a complete model directory, or is damaged.
    """
    read_sections(directory)
    folder = params_folder(directory)
    if not folder.is_dir():
        raise UserError(f"{directory} is damaged: it has no {PARAMS_FOLDER}/")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer, orbax_errors(directory, "is damaged"):
        metadata = checkpointer.metadata(str(folder)).item_metadata
    if metadata is None:
        raise UserError(f"{directory} is damaged: {PARAMS_FOLDER}/ has no readable metadata")
    flat = traverse_util.flatten_dict(metadata.tree, sep=".")
    return {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in flat.items()}


def load_params(directory: PathLike, targets: Mapping[str, jax.ShapeDtypeStruct] | None = None) -> dict[str, jax.Array]:
    """Loads parameters of the merged layout.

    Args:
        directory: A model directory.
        targets: Type and sharding of the parameters to load, by merged path; None loads all of them as they are
            stored, onto the first local device.

    Returns:
        Arrays by merged path.

    Raises:
        UserError: The directory is not a complete model directory, or is damaged.
    """
    if targets is None:
        targets = {path: _target(path, leaf, None, leaf.dtype) for path, leaf in stored_params(directory).items()}
    if not targets:
        return {}
    tree = traverse_util.unflatten_dict(dict(targets), sep=".")
    restore_args = ocp.checkpoint_utils.construct_restore_args(tree)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer, orbax_errors(directory, "is damaged"):
        restored = checkpointer.restore(
            str(params_folder(directory)),
            args=ocp.args.PyTreeRestore(item=tree, restore_args=restore_args, partial_restore=True),
        )
    return traverse_util.flatten_dict(restored, sep=".")


def _target(path: str, leaf: Any, mesh: Mesh | None, dtype: DTypeOf) -> jax.ShapeDtypeStruct:
    """The type and the place that a parameter shall have."""
    chosen = dtype(path) if callable(dtype) and not isinstance(dtype, type | np.dtype) else dtype
    sharding = (
        SingleDeviceSharding(jax.local_devices()[0]) if mesh is None else param_shardings({path: leaf}, mesh)[path]
    )
    return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(chosen or leaf.dtype), sharding=sharding)


def _initialise(config: VlmConfig, seed: int, targets: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Initial values of some parameters."""
    return _initialiser(config, seed, tuple(targets.items()))()


@functools.lru_cache(maxsize=8)
def _initialiser(
    config: VlmConfig, seed: int, targets: tuple[tuple[str, jax.ShapeDtypeStruct], ...]
) -> Callable[[], dict[str, jax.Array]]:
    """The jitted function behind `_initialise`. The compiler drops the computation of parameters without a target.

    Tracing the initial values of a model takes a second, so that the next model with the same settings reuses it.
    """

    def init() -> dict[str, jax.Array]:
        params = merge_stages(flatten_params(VisionLanguageModel(config, rngs=nnx.Rngs(seed))))
        return {path: params[path].astype(target.dtype) for path, target in targets}

    # Optimising hundreds of small random-number loops for the CPU takes longer than running them.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    shardings = {path: target.sharding for path, target in targets}
    return jax.jit(init, out_shardings=shardings, compiler_options=options)
