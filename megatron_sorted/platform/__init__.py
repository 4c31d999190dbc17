"""Where it runs: one small contract for cpu and cuda; the only folder that names devices."""
