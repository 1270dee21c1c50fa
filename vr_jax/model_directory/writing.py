"""Writing model directories."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import traverse_util

from vr_jax import distributed
from vr_jax.array_files import write_small_arrays_whole
from vr_jax.model.parameters import flatten_params, merge_stages
from vr_jax.model.vlm import VisionLanguageModel
from vr_jax.model_directory.generation import GENERATION_FILE
from vr_jax.model_directory.layout import copy_side_files, orbax_errors, params_folder, write_sections
from vr_jax.storage import PathLike, as_path, complete_directory, write_json, write_text

CHAT_TEMPLATE_FILE = "chat_template.jinja"  # which transformers takes before those inside other files
# Both bound the host memory that a save needs beyond the arrays themselves (measured: 0.4 GB for any model).
_CHUNK_BYTES, _FILE_BYTES = 32 << 20, 64 << 20


def save_model(
    directory: PathLike,
    model: VisionLanguageModel,
    tokenizer_dir: PathLike | None = None,
    *,
    generation: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    owner: str = "",
) -> None:
    """Writes a whole model. All processes of a run call it together.

    Args:
        directory: The model directory, which appears only when it is complete.
        model: The model; its parameters may be sharded.
        tokenizer_dir: A folder whose `SIDE_FILES` are copied.
        generation: The fields of generation_config.json, which replaces that of the folder.
        overwrite: Whether an existing directory is replaced.
        owner: Who writes it (`storage.complete_directory`).

    Raises:
        UserError: The directory exists and `overwrite` is not set, or it cannot be written, e.g. since the disk is
            full. Then nothing is left of it.
    """
    params = merge_stages(flatten_params(model))
    sections = model.config.to_dict()
    save_params(directory, sections, params, tokenizer_dir, generation=generation, overwrite=overwrite, owner=owner)


def save_params(
    directory: PathLike,
    sections: Mapping[str, Any],
    params: Mapping[str, jax.Array],
    tokenizer_dir: PathLike | None = None,
    *,
    generation: Mapping[str, Any] | None = None,
    chat_template: str | None = None,
    overwrite: bool = False,
    owner: str = "",
) -> None:
    """Writes parameters of the merged layout, of a whole model or of a part of one.

    Args:
        directory: The model directory, which appears only when it is complete.
        sections: Those of `VlmConfig.to_dict()` that the parameters belong to.
        params: Arrays by merged path.
        tokenizer_dir: A folder whose `SIDE_FILES` are copied.
        generation: The fields of generation_config.json, which replaces that of the folder.
        chat_template: The tokenizer's chat template, where another file of the folder holds it.
        overwrite: Whether an existing directory is replaced.
        owner: Who writes it (`storage.complete_directory`).

    Raises:
        UserError: As `save_model`.
    """
    params_folder(directory)  # refuses what Orbax does not take, before anything is written
    size = sum(array.nbytes for array in params.values())

    def write_files() -> None:
        if distributed.is_first():
            write_sections(written, sections)
            if tokenizer_dir is not None:
                copy_side_files(tokenizer_dir, written)
            if generation is not None:
                write_json(as_path(written) / GENERATION_FILE, dict(generation))
            if chat_template is not None:
                write_text(as_path(written) / CHAT_TEMPLATE_FILE, chat_template)

    with complete_directory(directory, size=size, overwrite=overwrite, owner=owner) as written:
        _write_params(directory, written, params)
        distributed.together(write_files)


def _write_params(directory: PathLike, written: PathLike, params: Mapping[str, jax.Array]) -> None:
    tree = traverse_util.unflatten_dict(dict(params), sep=".")
    largest = max(array.nbytes for array in params.values())
    # The limit is on host copies that wait for the disk; Orbax refuses an array that is not below it.
    write_small_arrays_whole()
    handler = ocp.PyTreeCheckpointHandler(save_device_host_concurrent_gb=max(1, math.ceil(1.01 * largest / 1e9)))
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), tree)
    with ocp.Checkpointer(handler) as checkpointer, orbax_errors(directory, "cannot be written"):
        checkpointer.save(
            str(params_folder(written)),
            args=ocp.args.PyTreeSave(tree, save_args, ocdbt_target_data_file_size=_FILE_BYTES),
        )
