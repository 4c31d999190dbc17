"""Facts about a run and a host for the launchers in slurm/, which start runs on many hosts."""
