"""Measurements and comparisons on a host with Ascend NPUs."""

"""Measurements and comparisons on a host with Ascend NPUs."""
