"""The run around the steps: inputs, loop, checkpoints, evaluation, reports."""
