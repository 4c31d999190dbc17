"""A plug-in of vLLM: a nested model drafts for itself, or is served at a depth of its exits."""
