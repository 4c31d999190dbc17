"""Measurements and comparisons on a host with Ascend NPUs."""
