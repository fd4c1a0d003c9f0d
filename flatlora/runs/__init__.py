"""A run's folder and what is recorded in it."""
