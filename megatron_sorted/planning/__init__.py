"""What a run will take before it is started: parameters, memory, operations, messages, time. Arithmetic on settings alone."""
