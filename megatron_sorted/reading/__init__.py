"""Readers of bytes from outside: files that users, other programs or strangers wrote. Nothing in them is believed before it is checked."""
