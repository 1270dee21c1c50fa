"""Metrics that several benchmarks share. Each gives the same scores as lmms-eval (docs/design/benchmarks.md)."""
