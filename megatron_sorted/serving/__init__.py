"""OpenAI's API over a nested model."""
