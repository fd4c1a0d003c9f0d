"""Rows, images and captioned images of public data sets or local files, as training and evaluation read them."""
