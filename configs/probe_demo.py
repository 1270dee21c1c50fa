"""The demo's model with a probe of its size (docs/probe.md).

Variant `baseline`: the same model without Vision Remember.
"""

from pathlib import Path

from ml_collections import ConfigDict

from vr_jax.settings import read_config_file

PROBE = {
    "layers": (1, 2, 3),
    "width": 128,
    "heads": 8,
    # The stand-in has 1200 images, so a few hundred updates: a higher rate than the 1e-3 for 100,000 images.
    "lr": 1e-2,
    "weight_decay": 0.01,
    "epochs": 20,
    "batch_size": 64,
    "seeds": 3,
    "data_seed": 0,
}


def get_config(variant: str = "") -> ConfigDict:
    """Returns the demo's settings with those of the probe."""
    if variant not in ("", "baseline"):
        raise ValueError(f"no variant {variant!r}: expected none, or 'baseline'")
    config = read_config_file(Path(__file__).with_name("demo.py")).to_dict()
    if variant:
        config["model"]["refusion"] = None
    # docs/probe.md trains the two models there.
    config["probe"] = PROBE | {"checkpoint": f"runs/probe_{'base' if variant else 'vr'}/model"}
    return ConfigDict(config)
