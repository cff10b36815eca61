"""The worker container: its first process, and what its slave gives it."""
