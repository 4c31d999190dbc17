"""Readers of input from outside: files that users, other programs or strangers wrote.

Nothing in them is trusted before it is checked.
"""
