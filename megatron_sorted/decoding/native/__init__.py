"""Decoding on CPUs by compiled code: the same passes as `decoding.cache`, at the memory's speed."""

CHOICES = ("auto", "on", "off")
"""Values of ``--native``: whether the compiled library decodes; auto: where it can."""
