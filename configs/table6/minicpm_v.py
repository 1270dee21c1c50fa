"""MiniCPM-V-3B without Vision Remember, the baseline of the paper's Table 6.

Every setting is that of `minicpm_v_vr.py`, without the re-fusion blocks.

Variants: phase1, phase2.
"""

from pathlib import Path

from ml_collections import ConfigDict

from vr_jax.settings import read_config_file


def get_config(variant: str = "phase1") -> ConfigDict:
    """Returns the settings of a phase."""
    config = read_config_file(f"{Path(__file__).with_name('minicpm_v_vr.py')}:{variant}").to_dict()
    config["model"]["refusion"] = None
    config["trainable"] = tuple(glob for glob in config["trainable"] if glob != "refusion.*")
    return ConfigDict(config)
