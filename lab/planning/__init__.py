"""Plans beside what processes of this machine do."""
