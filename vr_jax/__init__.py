"""Efficient vision-language models with Vision Remember in JAX: train, convert, answer and evaluate.

The names below are what most programs need:

    import vr_jax

    model = vr_jax.load_model("runs/demo/model")

They are imported when they are first used, so that `import vr_jax` takes no time and starts no JAX backend.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vr_jax.data.processor import Processor
    from vr_jax.evaluation import evaluate
    from vr_jax.inference import Generator
    from vr_jax.model.config import VlmConfig
    from vr_jax.model.vlm import VisionLanguageModel
    from vr_jax.model_directory import load_model, save_model
    from vr_jax.settings import TrainConfig
    from vr_jax.training import train

    __version__: str

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
    value: Any
    match name:
        case "Generator":
            from vr_jax.inference import Generator as value
        case "Processor":
            from vr_jax.data.processor import Processor as value
        case "TrainConfig":
            from vr_jax.settings import TrainConfig as value
        case "VisionLanguageModel":
            from vr_jax.model.vlm import VisionLanguageModel as value
        case "VlmConfig":
            from vr_jax.model.config import VlmConfig as value
        case "evaluate":
            from vr_jax.evaluation import evaluate as value
        case "load_model":
            from vr_jax.model_directory import load_model as value
        case "save_model":
            from vr_jax.model_directory import save_model as value
        case "train":
            from vr_jax.training import train as value
        case "__version__":
            from importlib.metadata import version

            value = version("vr-jax")
        case _:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
