"""Reads rows, images and images with prompts of public data sets or local files, for training and evaluation."""
