"""The demo's own data: generated images with questions, a tokenizer, and writers in the formats of real sets."""
