"""Model directories: the format in which models lie on disk between import, training, inference and evaluation.

A model directory holds:

* `config.json`: the format's name and version, and the sections of `VlmConfig.to_dict()`. A directory that holds only
  a part of a model (an encoder, a decoder) has only the sections of that part; with an encoder there is the section
  `pixels`, the fields of `ImageConfig` that say how its pixels are normalised and resized.
* `params/`: the parameters as an Orbax PyTree in the merged layout (`vr_jax.model.parameters`). For example
  `decoder.layers.attn.q.kernel` has the shape (layers, in, out).
* `tokenizer.json` and other files of the tokenizer and the generation settings (`SIDE_FILES`). A directory that holds
  only an encoder has none.
* `_COMPLETE`: the marker that is written last; without it the directory does not count (`vr_jax.storage`).

Such a directory depends neither on the mesh and the number of devices, nor on the places of the re-fusion blocks.
"""

from vr_jax.model_directory.field_table import WAY_OUT, FieldTable
from vr_jax.model_directory.generation import (
    GENERATION_FILE,
    GENERATION_TABLE,
    GenerationSettings,
    generation_of_chat,
    kept_fields,
    read_generation,
    token_ids,
)
from vr_jax.model_directory.json_files import is_there, read_json
from vr_jax.model_directory.layout import (
    FORMAT,
    PIXELS,
    SIDE_FILES,
    VERSION,
    copy_side_files,
    has_tokenizer,
    read_config,
    read_sections,
)
from vr_jax.model_directory.reading import WarmStart, load_model, load_params, stored_params, warm_start
from vr_jax.model_directory.tokenizer import TOKENIZER_JSON_FILES, load_tokenizer
from vr_jax.model_directory.writing import save_model, save_params

__all__ = [
    "FORMAT",
    "GENERATION_FILE",
    "GENERATION_TABLE",
    "PIXELS",
    "SIDE_FILES",
    "TOKENIZER_JSON_FILES",
    "VERSION",
    "WAY_OUT",
    "FieldTable",
    "GenerationSettings",
    "WarmStart",
    "copy_side_files",
    "generation_of_chat",
    "has_tokenizer",
    "is_there",
    "kept_fields",
    "load_model",
    "load_params",
    "load_tokenizer",
    "read_config",
    "read_generation",
    "read_json",
    "read_sections",
    "save_model",
    "save_params",
    "stored_params",
    "token_ids",
    "warm_start",
]
