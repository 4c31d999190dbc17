"""Preparation of data: JSON lines to indexed token files."""
