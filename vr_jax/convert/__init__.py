"""Hugging Face and LLaVA checkpoints in and out: `python -m vr_jax.convert import|export`; see docs/convert.md."""
