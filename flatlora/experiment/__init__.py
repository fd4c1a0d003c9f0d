"""Runs experiments from the command line; run_exp.py defines the datasets and benchmarks."""
