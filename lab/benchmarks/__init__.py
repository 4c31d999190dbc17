"""Benchmarks of training steps, whole runs, checkpoints, conversions, rules and layouts."""
