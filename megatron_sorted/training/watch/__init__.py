"""The guards of a run: stop requests, hangs, non-finite steps, profiles, failures."""
