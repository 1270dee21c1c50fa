"""Text decoders, whose layers run in stages."""
