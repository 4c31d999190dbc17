"""Directories of Hugging Face models, read and written one tensor at a time."""
