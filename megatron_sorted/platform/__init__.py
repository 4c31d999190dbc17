"""Where it runs: one small contract for cpu, cuda and npu; the only folder that names devices."""
