"""From the command line to a finished run; run_exp.py says with which data sets and benchmarks."""
