"""Reads rows, images and captioned images of public data sets or local files, for training and evaluation."""
