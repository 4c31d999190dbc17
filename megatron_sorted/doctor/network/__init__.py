"""Tests how the processes of a job reach each other: who comes, whether all are alike, clocks, speed, and correct sums."""
