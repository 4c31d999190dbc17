"""Looks at a machine, and at the nodes of a job, and says what will not work there."""
