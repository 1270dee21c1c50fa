"""Runs `vr-jax eval`: `python eval.py --help` tells its flags."""

import sys

from vr_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["eval", *sys.argv[1:]]))
