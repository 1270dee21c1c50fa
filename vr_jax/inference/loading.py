"""A model directory, ready to answer: parameters on their devices, tokenizer and processor."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from vr_jax.data.processor import Processor
from vr_jax.errors import ConfigError, UserError
from vr_jax.inference.generate import GenerationError
from vr_jax.model.config import VlmConfig
from vr_jax.model.registry import PrunerConfig
from vr_jax.model.vlm import VisionLanguageModel
from vr_jax.model_directory import load_model, read_config
from vr_jax.sharding import ShardingError

LOADING_ERRORS = (UserError, GenerationError, ConfigError, ShardingError)


@dataclass(frozen=True)
class Loaded:
    model: VisionLanguageModel
    tokenizer: Any
    processor: Processor


def with_pruning(config: VlmConfig, choice: str | Mapping[str, Any] | None) -> VlmConfig:
    """`config` with a pruner, and with the image layout of that pruner's official code.

    choice: a name, for its defaults; or its fields, `name` among them, as a mapping or as JSON text. None changes
    nothing. Raises ConfigError for what is neither, or does not fit the model."""
    if choice is None:
        return config
    fields: Any = choice
    if isinstance(choice, str):
        try:
            fields = json.loads(choice) if choice.lstrip().startswith("{") else {"name": choice}
        except json.JSONDecodeError as error:
            raise ConfigError(f"pruning {choice!r} is no valid JSON object: {error}") from None
    try:
        pruning = PrunerConfig.from_dict(dict(fields))
        return dataclasses.replace(config, pruning=pruning, image=pruning.adapt_image(config.image))
    except TypeError as error:  # a field of the wrong type, which comparisons refuse
        raise ConfigError(f"pruning {choice!r}: a field has the wrong type ({error})") from None


def load_for_inference(
    directory: Path, mesh: Mesh | None = None, *, config: VlmConfig | None = None, dtype: str | None = None
) -> Loaded:
    """config: another than the saved one (see `load_model`). dtype: of parameters and activations, "float32" or
    "bfloat16"; None keeps those of the config and the directory.

    Raises UserError for what is not a whole model, GenerationError for a directory without a usable
    tokenizer, ConfigError for a dtype that does not exist or a tokenizer larger than the vocabulary."""
    config = config or read_config(directory)
    if dtype is not None:
        config = dataclasses.replace(config, dtype=dtype)  # type: ignore[arg-type]
    tokenizer, processor = load_tokenizer(directory, config)
    return Loaded(load_model(directory, mesh, config, dtype=dtype), tokenizer, processor)


def load_tokenizer(directory: Path, config: VlmConfig) -> tuple[Any, Processor]:
    """A model directory's tokenizer, or that of any folder, and the processor of `config` with it.

    Raises GenerationError without a tokenizer that can write the template, ConfigError for one larger than the
    vocabulary."""
    # transformers takes seconds to import, and it imports torch where that is installed.
    from transformers import AutoTokenizer, PreTrainedConfig

    try:
        # With a config given, transformers does not look for a model of its own in ours (and warns).
        tokenizer = AutoTokenizer.from_pretrained(directory, config=PreTrainedConfig(), local_files_only=True)
        return tokenizer, Processor(tokenizer, config)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise GenerationError(
            f"{directory} has no usable tokenizer ({str(error).splitlines()[0]}); "
            "copy tokenizer.json and tokenizer_config.json of the language model there"
        ) from error
