"""PosGen, the synthetic benchmark of the Resonance RoPE paper: its data, trainings and page."""
