"""Regularizers (`rho=NAME`), one file each."""
