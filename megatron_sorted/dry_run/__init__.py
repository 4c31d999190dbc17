"""Ranks of a layout built and stepped without devices, beside the plan."""
