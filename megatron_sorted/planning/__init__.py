"""The plan of a run before it starts: parameters, memory, operations, messages and time.

Arithmetic on settings alone.
"""
