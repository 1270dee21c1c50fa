"""Hugging Face and LLaVA checkpoints in and out: `vr-jax convert import|export`; see docs/convert.md."""
