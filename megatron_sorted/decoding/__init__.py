"""Text from nested models: any depth, early exits, speculation within one model, draft trees. Needs torch and transformers alone."""
