"""vr_jax as a model inside lmms-eval 0.7: `python -m lmms_eval --model vr_jax ...` (docs/lmms_eval.md).

Nothing else in vr_jax imports this package, and only `model.py` needs lmms-eval, which needs torch.
"""

from __future__ import annotations

from typing import Any


def manifests() -> list[Any]:
    """What the entry point group `lmms_eval.models` asks for: the models of this project."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [ModelManifest("vr_jax", simple_class_path="vr_jax.evaluation.lmms_eval.model.VrJax")]
