"""Evaluation of every sub-model: held-out text, questions, tasks of lm-evaluation-harness."""
