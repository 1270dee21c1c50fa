"""Generated images with questions, their tokenizer and their files: data for trying everything without a download."""
