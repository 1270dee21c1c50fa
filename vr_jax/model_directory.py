"""A *model directory*: what convert writes, training exports, and training, inference and evaluation read.

    config.json    {"format": "vr_jax model", "version": 1} and the sections of VlmConfig.to_dict(); a part (only an
                   encoder, only a decoder, ...) holds only its sections
    params/        Orbax PyTree in the merged layout (`model/parameters.py`), e.g. decoder.layers.attn.q.kernel
                   (layers, in, out)
    tokenizer.json, generation_config.json, ...   copied files (SIDE_FILES)

A directory appears only when it is complete. It is independent of mesh, device count and re-fusion block positions."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx, traverse_util
from jax.sharding import Mesh, SingleDeviceSharding
from jax.typing import DTypeLike

from vr_jax.errors import UserError
from vr_jax.model.config import VlmConfig
from vr_jax.model.parameters import flatten_params, merge_stages, split_stages, unflatten_params
from vr_jax.model.vlm import VisionLanguageModel
from vr_jax.sharding import param_shardings
from vr_jax.storage import complete_directory

FORMAT, VERSION = "vr_jax model", 1
CONFIG_FILE, PARAMS_FOLDER = "config.json", "params"
SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)
# Both bound the host memory that a save needs beyond the arrays themselves (measured: 0.4 GB, whatever the model).
_CHUNK_BYTES, _FILE_BYTES = 32 << 20, 64 << 20

DTypeOf = DTypeLike | Callable[[str], DTypeLike] | None


@dataclass(frozen=True)
class WarmStart:
    """Where the parameters of a warm-started model came from, as paths of the merged layout."""

    loaded: tuple[str, ...]
    initialised: tuple[str, ...]  # not in any directory
    unused: tuple[str, ...]  # in a directory, not in the model, and allowed to be


def save_model(
    directory: str | Path,
    model: VisionLanguageModel,
    tokenizer_dir: str | Path | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Writes a whole model; all processes of a multi-host run call it together.

    tokenizer_dir: where the SIDE_FILES are copied from. Raises UserError if the directory exists (unless
    `overwrite`) and OSError, with nothing left behind, if the disk is full."""
    params = merge_stages(flatten_params(model))
    save_params(directory, model.config.to_dict(), params, tokenizer_dir, overwrite=overwrite)


def save_params(
    directory: str | Path,
    sections: Mapping[str, Any],
    params: Mapping[str, jax.Array],
    tokenizer_dir: str | Path | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """`save_model` for merged parameters, and for a part of a model: `sections` of VlmConfig.to_dict()."""
    size = sum(array.nbytes for array in params.values())
    with complete_directory(directory, size=size, overwrite=overwrite) as temporary:
        tree = traverse_util.unflatten_dict(dict(params), sep=".")
        largest = max(array.nbytes for array in params.values())
        # Host copies that may wait for the disk; Orbax refuses an array that is not below the limit.
        limit = max(1, math.ceil(1.01 * largest / 1e9))
        handler = ocp.PyTreeCheckpointHandler(save_device_host_concurrent_gb=limit)
        save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), tree)
        with ocp.Checkpointer(handler) as checkpointer, _orbax_errors(directory, "cannot be written"):
            checkpointer.save(
                (temporary / PARAMS_FOLDER).absolute(),
                args=ocp.args.PyTreeSave(tree, save_args, ocdbt_target_data_file_size=_FILE_BYTES),
            )
        if jax.process_index() == 0:
            # transformers' AutoTokenizer takes a folder whose config.json names no model_type for Mistral's.
            config = {"format": FORMAT, "version": VERSION, "model_type": "vr_jax", **sections}
            (temporary / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
            if tokenizer_dir is not None:
                copy_side_files(tokenizer_dir, temporary)


def copy_side_files(source: str | Path, target: str | Path) -> None:
    """Copies what of SIDE_FILES exists."""
    for name in SIDE_FILES:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, Path(target) / name)


def read_sections(directory: str | Path) -> dict[str, Any]:
    """The sections of config.json; all those of a VlmConfig, or those of a part.

    Raises UserError for what is not a readable model directory."""
    path = Path(directory) / CONFIG_FILE
    try:
        values = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        inside = next((p.parent for p in sorted(Path(directory).glob(f"*/{CONFIG_FILE}"))), None)
        hint = f"; did you mean {inside}?" if inside else ""
        raise UserError(f"{directory} is not a model directory: it has no {CONFIG_FILE}{hint}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise UserError(f"{path} is not a vr_jax model's; import other formats with `vr-jax convert import`")
    values.pop("model_type", None)
    version = values.pop("version", None)
    if version != VERSION:
        raise UserError(f"{path} has version {version}, this code reads version {VERSION}")
    return values


def read_config(directory: str | Path) -> VlmConfig:
    """The config of a whole model; raises UserError for a part of one."""
    sections = read_sections(directory)
    if not {"encoder", "decoder", "projector", "image"} <= set(sections):
        raise UserError(
            f"{directory} holds only parts of a model ({', '.join(sorted(sections))}); start training from it "
            "with a config that names the other parts"
        )
    return VlmConfig.from_dict(sections)


def load_model(
    directory: str | Path,
    mesh: Mesh | None = None,
    config: VlmConfig | None = None,
    *,
    dtype: DTypeOf = None,
) -> VisionLanguageModel:
    """The model of a directory, each parameter restored straight into its shards on `mesh` (None: one device).

    config: another than the saved one, e.g. with re-fusion blocks moved or another activation dtype; every parameter must
    still be there, and be used. dtype: of the parameters, or a function of their merged path; None keeps the
    model's own (float32). Raises UserError naming each missing, unused or mis-shaped parameter."""
    config = config or read_config(directory)
    # Without unpad no newline is ever read, and LLaVA's stage-1 checkpoints have none.
    optional = () if config.image.unpad else ("image_newline",)
    model, report = warm_start([directory], config, mesh, dtype=dtype)
    missing = [path for path in report.initialised if path not in optional]
    if missing:
        raise UserError(
            _listed(
                f"{directory} lacks parameters of the config, {len(missing)} in all (is it this model's?):",
                missing,
            )
        )
    return model


def warm_start(
    directories: Sequence[str | Path],
    config: VlmConfig,
    mesh: Mesh | None = None,
    *,
    dtype: DTypeOf = None,
    seed: int = 0,
    allow_unused: Sequence[str] = (),
) -> tuple[VisionLanguageModel, WarmStart]:
    """A model of `config` that takes what the directories hold and initialises the rest as `VisionLanguageModel(config,
    rngs=nnx.Rngs(seed))` would: phase 2 from phase 1, phase 1 from an encoder and a decoder, LLaVA-VR from LLaVA.

    allow_unused: path prefixes of stored parameters that the model may lack, e.g. "refusion". Raises
    UserError naming each unused, mis-shaped or twice-given parameter."""
    abstract = nnx.eval_shape(lambda: VisionLanguageModel(config, rngs=nnx.Rngs(seed)))
    wanted = jax.eval_shape(merge_stages, flatten_params(abstract))
    wanted = {path: _target(path, leaf, mesh, dtype) for path, leaf in wanted.items()}
    merged: dict[str, jax.Array] = {}
    unused: list[str] = []
    problems: list[str] = []
    for directory in directories:
        stored = stored_params(directory)
        extra = [path for path in stored if path not in wanted]
        unused += extra
        problems += [
            f"{path} {stored[path].shape} of {directory}: unused, the config has no such parameter"
            for path in extra
            if not path.startswith(tuple(allow_unused))
        ]
        problems += [
            f"{path} of {directory}: found {stored[path].shape}, expected {leaf.shape}"
            for path, leaf in wanted.items()
            if path in stored and stored[path].shape != leaf.shape
        ]
        problems += [f"{path} of {directory}: another directory has it too" for path in stored if path in merged]
        if not problems:
            merged |= load_params(directory, {path: wanted[path] for path in stored if path in wanted})
    if problems:
        raise UserError(_listed("the parameters do not fit the config:", problems))
    loaded, fresh = tuple(merged), [path for path in wanted if path not in merged]
    if fresh:
        merged |= _initialise(config, seed, {path: wanted[path] for path in fresh})
    staged: dict[str, jax.Array] = {}
    for path in list(merged):  # one at a time, so that only one parameter exists twice
        staged |= split_stages({path: merged.pop(path)}, config)
    report = WarmStart(loaded=loaded, initialised=tuple(fresh), unused=tuple(unused))
    return unflatten_params(abstract, staged), report


def stored_params(directory: str | Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Merged path -> shape and dtype on disk, without reading an array."""
    read_sections(directory)
    folder = (Path(directory) / PARAMS_FOLDER).absolute()
    if not folder.is_dir():
        raise UserError(f"{directory} is damaged: it has no {PARAMS_FOLDER}/")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer, _orbax_errors(directory, "is damaged"):
        metadata = checkpointer.metadata(folder).item_metadata
    if metadata is None:
        raise UserError(f"{directory} is damaged: {PARAMS_FOLDER}/ has no readable metadata")
    flat = traverse_util.flatten_dict(metadata.tree, sep=".")
    return {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in flat.items()}


def load_params(
    directory: str | Path, targets: Mapping[str, jax.ShapeDtypeStruct] | None = None
) -> dict[str, jax.Array]:
    """Merged path -> array. targets: which, with dtype and sharding; None: all, as stored, on one device."""
    if targets is None:
        targets = {path: _target(path, leaf, None, leaf.dtype) for path, leaf in stored_params(directory).items()}
    if not targets:
        return {}
    tree = traverse_util.unflatten_dict(dict(targets), sep=".")
    restore_args = ocp.checkpoint_utils.construct_restore_args(tree)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer, _orbax_errors(directory, "is damaged"):
        restored = checkpointer.restore(
            (Path(directory) / PARAMS_FOLDER).absolute(),
            args=ocp.args.PyTreeRestore(item=tree, restore_args=restore_args, partial_restore=True),
        )
    return traverse_util.flatten_dict(restored, sep=".")


def _target(path: str, leaf: Any, mesh: Mesh | None, dtype: DTypeOf) -> jax.ShapeDtypeStruct:
    chosen = dtype(path) if callable(dtype) and not isinstance(dtype, type | np.dtype) else dtype
    sharding = (
        SingleDeviceSharding(jax.local_devices()[0]) if mesh is None else param_shardings({path: leaf}, mesh)[path]
    )
    return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(chosen or leaf.dtype), sharding=sharding)


def _initialise(config: VlmConfig, seed: int, targets: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Only the wanted parameters are computed: the compiler drops the others."""

    def init() -> dict[str, jax.Array]:
        params = merge_stages(flatten_params(VisionLanguageModel(config, rngs=nnx.Rngs(seed))))
        return {path: params[path].astype(target.dtype) for path, target in targets.items()}

    # Optimising hundreds of little random-number loops for the CPU takes longer than running them.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    where = {path: target.sharding for path, target in targets.items()}
    return jax.jit(init, out_shardings=where, compiler_options=options)()


@contextlib.contextmanager
def _orbax_errors(directory: str | Path, what: str) -> Iterator[None]:
    """TensorStore reports everything, a full disk included, as a ValueError of many lines."""
    try:
        yield
    except (ValueError, KeyError, FileNotFoundError) as error:
        text = str(error)
        code = re.search(r"os_error_code='(\d+)'", text)
        if code and int(code[1]) != 2:
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(directory)) from error
        reason = text.split(" [tensorstore_spec")[0].splitlines()[0] if text else type(error).__name__
        raise UserError(f"{directory} {what}: {reason}") from error


def _listed(title: str, lines: Sequence[str]) -> str:
    return "\n".join([title, *(f"  {line}" for line in lines)])
