"""Tensors of a model on disk: by name, by pairs of ours and theirs, merged with adapters; the memory they are read into."""
