"""Are two directories the same model? Every tensor bit for bit, and the logits of every exit by two programs."""
