"""LLaVA-VR with SigLIP-L/16-384 and Qwen2-1.5B-Instruct: the 2B model of the paper's abstract (section 4.1).

    | phase | data       | template | image  | lr   | batch | trained                        |
    |-------|------------|----------|----------|------|-------|--------------------------------|
    | 1     | CC-558K    | plain    | one tile | 1e-3 | 256   | projector, Vision Remember     |
    | 2     | 779K       | qwen_1_5 | AnyRes9  | 2e-4 | 32    | the same, LLM, image newline   |

One epoch each, AdamW, cosine to 0 after a warm-up of 3 %, no weight decay, gradients clipped at 1.
Variants: phase1, phase2, and phase1_baseline, phase2_baseline without Vision Remember."""

from ml_collections import ConfigDict

from vr_jax.experiments import paper
from vr_jax.settings import recipe


def get_config(variant: str = "phase1") -> ConfigDict:
    return recipe.llava_vr(variant, paper.TEXTS["1.5b"])
