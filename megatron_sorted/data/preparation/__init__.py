"""From JSON lines to indexed token files."""
