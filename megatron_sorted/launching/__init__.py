"""Start runs on many hosts: what the launchers in slurm/ must know of a run and of a host."""
