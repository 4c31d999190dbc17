"""Decoding on CPUs by compiled code: the same passes as `decoding.cache`, at the memory's speed."""
