"""The commands of `vr-jax`: `main.py` finds one, `flags.py` parses its flags, and each has a module of its own."""
