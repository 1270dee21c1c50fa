"""Runs `vr-jax train`: `python train.py --help` tells its flags."""

import sys

from vr_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
