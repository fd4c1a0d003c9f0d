"""What every other room uses: errors, files that are written whole or not at all, caches, the terminal, precision."""
