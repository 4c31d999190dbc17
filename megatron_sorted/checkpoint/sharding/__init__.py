"""What a checkpoint holds of a network that many ranks share."""
