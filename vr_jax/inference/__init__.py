"""Answering: sampling, batched generation with a static cache, streaming. Start at `generate.Generator`."""
