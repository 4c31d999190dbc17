"""Reports to console and JSON lines."""
