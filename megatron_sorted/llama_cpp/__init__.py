"""Files for llama.cpp: written by its own converter, compared with the model, and served by it."""
