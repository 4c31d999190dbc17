"""Checks of a machine, or of the nodes of a job: what will not work there, and the remedy."""
