"""Directory layout, sharded save and load."""
