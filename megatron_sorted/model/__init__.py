"""The network: settings to Megatron's config, segments, heads, one pipeline stage."""
