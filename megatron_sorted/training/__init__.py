"""Training on megatron-core: the run (`run`), one step of it (`step`), and its guards (`watch`)."""
