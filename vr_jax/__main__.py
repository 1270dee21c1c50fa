"""Runs the commands: `python -m vr_jax COMMAND` is the same as `vr-jax COMMAND`."""

import sys

from vr_jax.cli.main import main

sys.exit(main())
