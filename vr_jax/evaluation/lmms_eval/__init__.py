"""vr_jax as a model inside lmms-eval 0.7: `python -m lmms_eval --model vr_jax ...` (docs/lmms_eval.md).

No other package of vr_jax imports this one. Only its module `model` needs lmms-eval, which needs torch.
"""

from __future__ import annotations

from typing import Any


def manifests() -> list[Any]:
    """Returns the models of this project, for the entry point group `lmms_eval.models`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [ModelManifest("vr_jax", simple_class_path="vr_jax.evaluation.lmms_eval.model.VrJax")]
