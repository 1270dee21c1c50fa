"""Efficient vision-language models with Vision Remember in JAX: train, convert, answer and evaluate.

The names below are what most programs need:

    import vr_jax

    model = vr_jax.load_model("runs/demo/model")

They are imported when they are first used, so that `import vr_jax` takes no time and starts no JAX backend.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vr_jax.data.processor import Processor
    from vr_jax.evaluation.evaluate import evaluate
    from vr_jax.inference import Generator
    from vr_jax.model.config import VlmConfig
    from vr_jax.model.vlm import VisionLanguageModel
    from vr_jax.model_directory import load_model, save_model
    from vr_jax.settings import TrainConfig
    from vr_jax.training import train

    __version__: str

_MODULES = {
    "Generator": "vr_jax.inference",
    "Processor": "vr_jax.data.processor",
    "TrainConfig": "vr_jax.settings",
    "VisionLanguageModel": "vr_jax.model.vlm",
    "VlmConfig": "vr_jax.model.config",
    "evaluate": "vr_jax.evaluation",
    "load_model": "vr_jax.model_directory",
    "save_model": "vr_jax.model_directory",
    "train": "vr_jax.training.loop",
}

__all__ = [
    "Generator",
    "Processor",
    "TrainConfig",
    "VisionLanguageModel",
    "VlmConfig",
    "__version__",
    "evaluate",
    "load_model",
    "save_model",
    "train",
]


def __getattr__(name: str) -> Any:
    """Imports a name of `__all__` when it is first used (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "__version__":
        from importlib.metadata import version

        return version("vr-jax")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    """Lists the public names beside those that are there already."""
    return sorted({*globals(), *__all__})
