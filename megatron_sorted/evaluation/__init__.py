"""How good every sub-model of a finished model is: held-out text, questions, tasks of lm-evaluation-harness."""
