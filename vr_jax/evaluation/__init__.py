"""Scoring a model on benchmarks: `benchmarks/` says what is asked and how it is scored, `runner.evaluate` does it."""
