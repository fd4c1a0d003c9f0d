"""One experiment: compose → validate → build → train → evaluate → record.

python run_exp.py model=llama dataset=meta_math peft=lora peft.lora_r=8 rho=flat rho.sigma=0.05 seed=42
"""

import sys
from functools import partial
from pathlib import Path

from data import DATASETS
from data.kinds import KINDS as ROW_KINDS
from eval import BENCHMARKS
from eval.command import evaluate, print_score
from eval.kinds import KINDS as BENCHMARK_KINDS
from flatlora.experiment import launch
from flatlora.experiment.prepare import prepare as prepare_inputs
from flatlora.experiment.suite import Suite

SUITE = Suite(
    conf_dir=Path(__file__).parent / "conf",
    script=Path(__file__),
    datasets=DATASETS,
    benchmarks=BENCHMARKS,
    kinds=ROW_KINDS,
    backends={name: kind.backend for name, kind in BENCHMARK_KINDS.items()},
    evaluate=evaluate,
    print_score=print_score,
)
main, prepare = partial(launch.main, SUITE), partial(prepare_inputs, SUITE)
experiment_of, experiments_of = partial(launch.experiment_of, SUITE), partial(launch.experiments_of, SUITE)

if __name__ == "__main__":
    sys.exit(main())
