"""Metrics that several benchmarks share, each exactly as lmms-eval computes it."""
