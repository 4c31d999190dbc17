"""Ranks of a layout, built and stepped without devices and compared with the plan."""
