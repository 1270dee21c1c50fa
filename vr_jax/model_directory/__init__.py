"""Model directories: the format in which models lie on disk between import, training, inference and evaluation.

A model directory holds:

* `config.json`: the format's name and version, and the sections of `VlmConfig.to_dict()`. A directory that holds only
  a part of a model (an encoder, a decoder) has only the sections of that part.
* `params/`: the parameters as an Orbax PyTree in the merged layout (`vr_jax.model.parameters`). For example
  `decoder.layers.attn.q.kernel` has the shape (layers, in, out).
* `tokenizer.json` and other files of the tokenizer and the generation settings (`SIDE_FILES`).
* `_COMPLETE`: the marker that is written last; without it the directory does not count (`vr_jax.storage`).

Such a directory depends neither on the mesh and the number of devices, nor on the places of the re-fusion blocks.
"""

from vr_jax.model_directory.layout import FORMAT, SIDE_FILES, VERSION, copy_side_files, read_config, read_sections
from vr_jax.model_directory.reading import WarmStart, load_model, load_params, stored_params, warm_start
from vr_jax.model_directory.writing import save_model, save_params

__all__ = [
    "FORMAT",
    "SIDE_FILES",
    "VERSION",
    "WarmStart",
    "copy_side_files",
    "load_model",
    "load_params",
    "read_config",
    "read_sections",
    "save_model",
    "save_params",
    "stored_params",
    "warm_start",
]
