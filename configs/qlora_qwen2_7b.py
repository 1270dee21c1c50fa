"""Phase 2 of LLaVA-VR with Qwen2-7B on one GPU of 24 GB: LoRA adapters of the decoder over a base in nf4 (QLoRA).

Every setting is that of `llava_vr_qwen2_7b.py:phase2`, but for those that are set here. Rank, alpha and learning rates
are those of LLaVA's scripts for LoRA (scripts/v1_5/finetune_lora.sh): adapters at 2e-4, the projector at 2e-5.
docs/plan.md says what memory it needs.
"""

from pathlib import Path

from ml_collections import ConfigDict

from vr_jax.settings import read_config_file


def get_config() -> ConfigDict:
    """Returns the settings."""
    config = read_config_file(f"{Path(__file__).with_name('llava_vr_qwen2_7b.py')}:phase2").to_dict()
    config["trainable"] = ("projector.*", "refusion.*", "image_newline")
    config["lora"] = {"rank": 128, "alpha": 256.0, "targets": ("decoder.*",), "rslora": False}
    config["frozen_dtype"] = "nf4"
    config["optimizer"]["lr_groups"] = (("projector.*", 2e-5),)
    # One row of four samples at a time.
    config["batch"]["accumulation"] = config["batch"]["rows"]
    return ConfigDict(config)
