"""A run's folder, its record and its metrics."""
