"""Parts of the planning tools."""
