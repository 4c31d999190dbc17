"""Choose how to decode a model on this machine."""
