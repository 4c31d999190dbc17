"""llama.cpp with and without an extracted sub-model that drafts, measured in turns."""
