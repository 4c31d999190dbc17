"""Compare ways to decode on the same prompts."""
