"""Used by every other package: errors, atomic writes of files, caches, the terminal, precision."""
