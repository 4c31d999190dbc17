"""From hidden states to loss values and gradients."""
