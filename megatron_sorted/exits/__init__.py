"""The method as pure arithmetic.

It covers depths, placement on stages, coefficients (rules of depth, learned rules, curricula, a
guard for the full model) and the selection of exits that train at a step.
"""
