"""The demo's recipe with a probe of its size (docs/probe.md). Variant `baseline`: the same model without Vision
Remember."""

from pathlib import Path

from ml_collections import ConfigDict

from vr_jax.settings.config_files import load_recipe


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "baseline"):
        raise ValueError(f"no variant {variant!r}: expected none, or 'baseline'")
    config = load_recipe(Path(__file__).with_name("demo.py"))
    if variant:
        with config.ignore_type():
            config.model.refusion = None
    # A few hundred updates are all that 1200 images give: a higher rate than the 1e-3 of 100,000.
    config.probe = ConfigDict(
        {"layers": (1, 2, 3), "width": 128, "epochs": 20, "batch_size": 64, "seeds": 3, "lr": 1e-2}
    )
    config.probe.checkpoint = f"runs/probe_{'base' if variant else 'vr'}/model"  # where docs/probe.md trains it
    return config
