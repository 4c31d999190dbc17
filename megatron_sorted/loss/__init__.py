"""From hidden states to loss values and gradients.

Read ``deferred`` first (when an exit is computed), then ``linear_cross_entropy`` (how).
"""
