"""A finished model on disk, opened with transformers: its directory, its exits, its tokenizer."""
