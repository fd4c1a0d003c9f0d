"""The typed, frozen description of one experiment: how a section is declared, the sections, and `parse`."""
