"""Kernels: computations that depend on the platform, each a package with an `api`, a reference and its backends.

Only code in this package and in `vr_jax.inference` asks what platform a program is for. A package chooses the backend
in its `api.py`; `reference.py` defines what every backend computes.
"""
