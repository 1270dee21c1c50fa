"""The demo's own data: generated pictures with questions, a tokenizer, and writers in the formats of real sets."""
