"""Process groups, copies of a parameter on several stages, and fully sharded data parallelism."""
