"""A soak of the server: random clients, and every text beside the one that is written alone."""
