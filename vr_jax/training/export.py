"""Writes what a state of the training stands for: the model directory, and the adapter of a run with LoRA."""

from __future__ import annotations

import logging
from typing import Any

from vr_jax.data.conversations import chat_format
from vr_jax.model.config import VlmConfig
from vr_jax.model_directory import generation_of_chat, load_tokenizer, save_model
from vr_jax.settings import TrainConfig
from vr_jax.storage import Path
from vr_jax.training.adapters import export_adapter
from vr_jax.training.run_record import ADAPTER_FOLDER, BEST_ADAPTER_FOLDER, BEST_EXPORT_FOLDER, EXPORT_FOLDER
from vr_jax.training.state import ModelTree, TrainState, merged_model

logger = logging.getLogger("vr_jax.training")


def export_state(
    workdir: Path,
    tree: ModelTree,
    state: TrainState,
    tokenizer_dir: Path | None,
    *,
    owner: str = "",
    config: TrainConfig | None = None,
    best: bool = False,
) -> None:
    """Writes the model directory `<workdir>/model`, which chat, evaluation and the next phase read.

    A run with LoRA also writes `<workdir>/adapter`, which PEFT reads.

    Args:
        workdir: Folder of the run.
        tree: The model's parameters.
        state: The state of the training.
        tokenizer_dir: Folder of the tokenizer's files, which are copied.
        owner: The identity of the run, whose older export is replaced.
        config: The settings of the run, which a run with LoRA gives.
        best: Whether the folders are those of the best checkpoint, `model_best` and `adapter_best`.

    Raises:
        UserError: The directory cannot be written, or somebody else has written it.
    """
    if config is not None and config.lora.rank:
        export_adapter(workdir / (BEST_ADAPTER_FOLDER if best else ADAPTER_FOLDER), config, tree, state, owner=owner)
    target = workdir / (BEST_EXPORT_FOLDER if best else EXPORT_FOLDER)
    model = merged_model(tree, state)
    generation = None if tokenizer_dir is None else generation_settings(model.config, tokenizer_dir)
    save_model(target, model, tokenizer_dir, generation=generation, overwrite=True, owner=owner)
    logger.info("model directory: %s", target)


def generation_settings(config: VlmConfig, tokenizer_dir: Path) -> dict[str, Any] | None:
    """Returns the settings of generation of a trained model.

    It was trained to end its replies as its chat format does, which a base model's settings do not name.
    """
    tokenizer = load_tokenizer(tokenizer_dir) if config.template == "tokenizer" else None
    return generation_of_chat(tokenizer_dir, chat_format(config.template, tokenizer).end_tokens[0])
