"""From indexed token files to samples of a run."""
