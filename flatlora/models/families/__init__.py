"""Model families, one file per family; the file name is the value of `model.family`."""
