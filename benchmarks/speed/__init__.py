"""Benchmarks of training and generation, most of them against transformers."""
