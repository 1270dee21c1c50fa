"""A model directory, ready to answer: parameters on their devices, tokenizer and processor."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from jax.sharding import Mesh

from vr_jax.data.processor import Processor
from vr_jax.errors import UserError
from vr_jax.model.adaptation import QUANTISED, quantised_model
from vr_jax.model.config import VlmConfig
from vr_jax.model.parameters import flatten_params
from vr_jax.model.quantization import Kind, import_qwix
from vr_jax.model.registry import read_pruner
from vr_jax.model.vlm import VisionLanguageModel
from vr_jax.model_directory import (
    GENERATION_FILE,
    GenerationSettings,
    load_model,
    load_tokenizer,
    read_config,
    read_generation,
)
from vr_jax.storage import PathLike, as_path

DType = Literal["float32", "bfloat16"]

logger = logging.getLogger("vr_jax.inference")


@dataclass(frozen=True)
class Loaded:
    """A model that can answer.

    Attributes:
        model: The model with its parameters.
        processor: Turns conversations into prompts of the model.
        generation: How the model directory says that replies are generated.
    """

    model: VisionLanguageModel
    processor: Processor
    generation: GenerationSettings = field(default_factory=GenerationSettings)

    @property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer of the processor."""
        return self.processor.tokenizer


def with_pruning(config: VlmConfig, choice: str | Mapping[str, Any] | None) -> VlmConfig:
    """Adds a pruner to the config of a model, with the image layout of that pruner's official code.

    Args:
        config: The config of a model.
        choice: The name of a pruner, for its default settings; or its fields, `name` among them, as a mapping or as the
            text of a JSON object. None changes nothing.

    Raises:
        ConfigError: The choice is none of these, or does not fit the model.
    """
    pruning = read_pruner(choice)
    if pruning is None:
        return config
    return dataclasses.replace(config, pruning=pruning, image=pruning.adapt_image(config.image))


def load_for_inference(
    directory: PathLike,
    mesh: Mesh | None = None,
    *,
    config: VlmConfig | None = None,
    dtype: DType | None = None,
    weights: Kind | None = None,
) -> Loaded:
    """Loads a model directory with its tokenizer.

    Args:
        directory: The model directory.
        mesh: The devices that the parameters are sharded over; None takes one device.
        config: Another config than the saved one; see `load_model`.
        dtype: The type of parameters and activations. None keeps the type that each parameter is stored in, and the
            config's type of the activations.
        weights: How the kernels of linear layers are quantised (`vr_jax.model.quantization`); None keeps them.

    Raises:
        UserError: The directory holds no whole model or no usable tokenizer, or the config does not fit, or qwix is
            missing.
    """
    config = config or read_config(directory)
    if dtype is not None:
        config = dataclasses.replace(config, dtype=dtype)
    processor = load_processor(directory, config)
    generation = read_generation(directory)
    generation.check_vocabulary(config.decoder.vocab_size, str(as_path(directory) / GENERATION_FILE))
    if weights is not None:
        import_qwix()  # Its absence is told before the model is loaded.
    model = load_model(directory, mesh, config, dtype=dtype)
    if weights is not None:
        model = quantised_model(model, weights, mesh)
    loaded = Loaded(model, processor, generation)
    leaves = flatten_params(loaded.model).items()
    stored = sorted({str(leaf.dtype) for path, leaf in leaves if not path.endswith(QUANTISED)})
    level = logging.INFO if stored == [config.dtype] else logging.WARNING
    if weights is not None:
        stored = [f"{weights} (kernels of linear layers)", *stored]
    logger.log(level, "%s: parameters in %s, activations in %s", directory, " and ".join(stored), config.dtype)
    return loaded


def with_penalty(generation: GenerationSettings, repetition_penalty: float | None) -> GenerationSettings:
    """Returns the settings of a model directory with a penalty that replaces theirs, unless it is None."""
    if repetition_penalty is None:
        return generation
    return dataclasses.replace(generation, repetition_penalty=repetition_penalty)


def load_processor(directory: PathLike, config: VlmConfig) -> Processor:
    """Makes the processor of a model with the tokenizer of a folder.

    Args:
        directory: A model directory, or any folder with the files of a Hugging Face tokenizer.
        config: The model's config.

    Raises:
        UserError: The folder has no tokenizer, or the tokenizer cannot write the chat template or has more tokens than
            the model's vocabulary.
    """
    tokenizer = load_tokenizer(directory)
    try:
        return Processor(tokenizer, config)
    except ValueError as error:
        raise UserError(f"{directory} has no usable tokenizer ({str(error).splitlines()[0]})") from error
