"""The sharded state of a network that many ranks share, saved so that any layout can load it."""
