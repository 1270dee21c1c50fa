"""The probe of Fig. 1b: python -m vr_jax.probe --checkpoint=MODEL_DIR --data=TINY_IMAGENET_DIR (docs/probe.md)."""

import sys

from absl import app, flags
from ml_collections import config_flags

from vr_jax.cli import train as cli
from vr_jax.probe import main as probe

sys.argv[0] = "vr_jax.probe"  # what messages and --help call it, and where absl looks for the flags below

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Recipe; its model, mesh and probe sections are used, and its tokenizer with --random."
)
OPTIONS = (
    flags.DEFINE_string("checkpoint", None, "Model directory (what training exports and convert writes)."),
    flags.DEFINE_string("data", None, "Tiny-ImageNet's folder, or one of `python -m vr_jax.probe.stand_in`."),
    flags.DEFINE_string("output", None, "Where results.json and the figure go (default: <checkpoint>/probe)."),
    flags.DEFINE_bool("random", None, "Random weights: to try the probe out, or as a control."),
    flags.DEFINE_string("layers", None, "Decoder layers to tap, from 1 (default: 1,4,8,... and the last)."),
    flags.DEFINE_string("question", None, "The question about each image (default: Describe the image.)."),
    flags.DEFINE_integer("train_images", None, "Training images, as many of each class; 0: all (default: 20000)."),
    flags.DEFINE_integer("val_images", None, "Validation images; 0: all (default)."),
    flags.DEFINE_integer("epochs", None, "Passes over the training images (default: 15)."),
    flags.DEFINE_integer("batch_size", None, "Images per batch, over all devices (default: 256)."),
    flags.DEFINE_integer("seeds", None, "Heads per tap (default: 3)."),
    flags.DEFINE_integer("data_seed", None, "Of the subset and the order of the images (default: 0)."),
    flags.DEFINE_float("lr", None, "AdamW's learning rate, cosine to 0 (default: 0.001)."),
    flags.DEFINE_float("weight_decay", None, "AdamW's weight decay (default: 0.01)."),
    flags.DEFINE_integer("width", None, "Width of the head (default: 512)."),
    flags.DEFINE_integer("heads", None, "Attention heads of the head (default: 8)."),
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Of the model (default: as saved)."),
    flags.DEFINE_string("label", None, "Names the model in plots."),
    flags.DEFINE_integer("workers", None, "Threads that read images (default: 8)."),
    flags.DEFINE_bool("overwrite", None, "Replace the results in the output folder."),
)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        cli.fail(2, f"unexpected argument {argv[1]!r}")
    sys.exit(probe.main({option.name: option.value for option in OPTIONS}, CONFIG.value))


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags)
