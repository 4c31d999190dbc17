"""Parts of the decoding tools."""
