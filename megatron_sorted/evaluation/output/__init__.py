"""What an evaluation prints, writes and draws."""
