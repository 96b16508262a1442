"""What runs together in one process, from its start to its end."""
