"""What text means: tokenizers, and how a conversation becomes tokens."""
