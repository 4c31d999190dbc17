"""Directories of Hugging Face models, read and written tensor by tensor."""
