"""Draft tokens with early exits and verify them with the full model."""
