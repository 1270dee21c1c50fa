"""Loading the tokenizer of a folder."""

from __future__ import annotations

from typing import Any

from vr_jax.errors import UserError
from vr_jax.model_directory.json_files import read_json
from vr_jax.model_directory.layout import SIDE_FILES
from vr_jax.storage import PathLike, as_path, on_disk

TOKENIZER_JSON_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def load_tokenizer(directory: PathLike) -> Any:
    """Loads the Hugging Face tokenizer of a folder, by all of its files.

    Args:
        directory: A model directory, or any folder with the files of a tokenizer.

    Raises:
        UserError: The folder has no tokenizer, or one that cannot be loaded.
    """
    # transformers takes seconds to import, and it imports torch where that is installed.
    from transformers import AutoTokenizer, PreTrainedConfig

    for name in TOKENIZER_JSON_FILES:
        path = as_path(directory) / name
        if path.exists():
            read_json(path)
    try:
        # Because a config is given, transformers does not look for one of its own models in config.json.
        return AutoTokenizer.from_pretrained(
            on_disk(directory, SIDE_FILES), config=PreTrainedConfig(), local_files_only=True
        )
    # An ImportError says that the tokenizer's class needs a library, as those of SigLIP's text tower do.
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"{directory} has no usable tokenizer ({reason}); copy tokenizer.json and tokenizer_config.json of the "
            "language model there"
        ) from error
