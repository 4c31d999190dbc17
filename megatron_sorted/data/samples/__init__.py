"""The samples of a run, from indexed token files."""
