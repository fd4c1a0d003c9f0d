"""Families of models, one file each; the name of the file is the value of `model.family`."""
