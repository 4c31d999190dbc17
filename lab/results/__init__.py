"""Comparisons of methods of training, and the steps they consist of."""
