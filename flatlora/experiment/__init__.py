"""From the command line to a finished run; run_exp.py says with which data sets and benchmarks."""

from flatlora.experiment.launch import experiment_of, experiments_of, main
from flatlora.experiment.prepare import Inputs, prepare
from flatlora.experiment.suite import RowKind, Suite

__all__ = ["Inputs", "RowKind", "Suite", "experiment_of", "experiments_of", "main", "prepare"]
