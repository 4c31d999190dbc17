"""One training step: our exits against megatron-core's own model and against exits computed in forward."""
