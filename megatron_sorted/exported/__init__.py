"""A finished model on disk, exported here or elsewhere: its exits, tokenizer and prompt template.

Models are built with transformers; checkpoints are converted to a temporary directory first.
"""
