"""Searches settings with Optuna: each trial is a run, whose record holds its result.

    python -m scripts.search --objective eval_loss [--trials 20] [--seed 0] [--direction maximize] OVERRIDES …

    python -m scripts.search --objective eval_loss rho=flat 'optim.lr=tag(log, interval(1e-5, 1e-3))' peft.lora_r=4,8,16

A key is searched if its value is a list A,B,C, a range(START,STOP) of whole numbers or an interval(LOW,HIGH);
tag(log, …) searches on a logarithmic scale. The objective is eval_loss, or BENCHMARK/METRIC with
dataset.evaluate=validation, as run.json names it. The same command continues a search: what is suggested depends on
--seed and the results alone, and finished runs are not trained again.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from rich.console import Console
from rich.table import Table
from rich.text import Text

import run_exp
from flatlora.config.experiment import Experiment
from flatlora.experiment import commandline
from flatlora.experiment.run import EXIT_CONFIG, EXIT_FAILED, EXIT_INTERRUPTED, run
from flatlora.inputs.rows import gather
from flatlora.runs.record import RunRecord
from flatlora.runs.run_folder import RunFolder
from flatlora.utils.console import quiet_libraries, report_errors
from flatlora.utils.errors import ConfigError, nearest

LOSS = "eval_loss"  # the one validation score that is no benchmark's
MOST_TRIALS = 10_000


class Trial(NamedTuple):
    """One run of a search."""

    values: Mapping[str, Any]
    objective: float | None  # None if the run failed
    folder: RunFolder


def main(words: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 if a trial finished, 1 if none did, 2 for an error, or that of a stopped run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objective", required=True)
    parser.add_argument("--direction", choices=["minimize", "maximize"], help=f"minimize for {LOSS}, else maximize")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the suggestions")
    options, rest = parser.parse_known_args(words)
    quiet_libraries()
    direction = options.direction or ("minimize" if options.objective == LOSS else "maximize")
    trials: list[Trial] = []
    try:
        code = search(rest, options.objective, direction, options.trials, options.seed, trials.append)
    except ConfigError as error:
        report_errors(error)
        code = EXIT_CONFIG
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    if trials:
        _print(trials, options.objective, direction)
    return code


def search(
    words: Sequence[str], objective: str, direction: str, count: int, seed: int, done: Callable[[Trial], None]
) -> int:
    """Runs the trials one after another, each of which goes to `done`; returns the exit code.

    Raises:
        ConfigError: the settings or the objective are invalid; if before the first trial, no weight was loaded.
    """
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError(["The package optuna is not installed: run pip install -e '.[optuna]'."])
    import optuna

    fixed, searched = _split(words)
    _, *found = gather(
        lambda: _validate_numbers(count, seed), *(lambda one=one: _distribution(one) for one in searched)
    )
    spaces = {override.key_or_group: space for override, space in zip(searched, found, strict=True)}
    _validate(objective, _corners(fixed, spaces))
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction=direction, sampler=optuna.samplers.TPESampler(seed=seed))
    finished = False
    for _ in range(count):
        trial = study.ask(spaces)
        settings = [*fixed, *(f"{key}={_text(value)}" for key, value in trial.params.items()), "resume=true"]
        experiment = run_exp.experiment_of(settings)
        code = run(run_exp.SUITE, experiment, settings)
        if code not in (0, EXIT_FAILED):
            return code
        folder = RunFolder.of(experiment)
        value = _objective_of(folder.record, objective) if code == 0 else None
        study.tell(trial, value, state=None if value is not None else optuna.trial.TrialState.FAIL)
        finished |= value is not None
        done(Trial({key: _text(value) for key, value in trial.params.items()}, value, folder))
    return 0 if finished else EXIT_FAILED


def _split(words: Sequence[str]) -> tuple[list[str], list[Override]]:
    """Returns the settings of all trials, and the overrides whose values are searched.

    Raises:
        ConfigError: words that are no overrides, or none that is searched.
    """
    flags, settings = commandline.split_flags(list(words))
    if flags:
        raise ConfigError([f"Unknown option {flags[0]}: --help shows those of the search."])
    settings, _ = commandline.rewrite(settings)
    settings, _ = commandline.name_jobs(settings)
    fixed, searched = commandline.split_sweep(settings)
    if not searched:
        raise ConfigError(
            ["Nothing to search: give a key several values, such as peft.lora_r=4,8 or 'optim.lr=interval(1e-5,1e-3)'."]
        )
    return fixed, searched


def _distribution(override: Override) -> Any:
    """Returns Optuna's distribution of the values of an override.

    Raises:
        ConfigError: values that cannot be searched.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    sweep, line = override.value(), override.input_line
    log = "log" in getattr(sweep, "tags", ())  # a glob has none
    try:
        if isinstance(sweep, ChoiceSweep):
            return CategoricalDistribution(list(dict.fromkeys(override.sweep_string_iterator())))
        if isinstance(sweep, IntervalSweep):
            return FloatDistribution(float(sweep.start), float(sweep.end), log=log)
        if isinstance(sweep, RangeSweep):
            numbers = range(*map(_whole, (sweep.start, sweep.stop, sweep.step)))
            return IntDistribution(numbers[0], numbers[-1], log=log, step=numbers.step)
    except (ValueError, IndexError, OverflowError) as error:
        reason = str(error).rstrip(".") or "there is no value in it"
        raise ConfigError([f"Cannot search {line}: {reason}; write interval(LOW,HIGH), or list the values."]) from error
    raise ConfigError([f"Cannot search {line}: write interval(LOW,HIGH), range(START,STOP), or list the values."])


def _whole(number: float) -> int:
    if number != int(number):
        raise ValueError("a range has whole numbers")
    return int(number)


def _text(value: Any) -> str:
    """A value as the command line has it; four digits of a number name a run."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _corners(fixed: Sequence[str], spaces: Mapping[str, Any]) -> list[Experiment]:
    """Returns experiments with every listed value and both ends of every range, to find errors before the first trial.

    Raises:
        ConfigError: with the errors of all of them.
    """
    values = {
        key: [_text(value) for value in getattr(space, "choices", None) or dict.fromkeys((space.low, space.high))]
        for key, space in spaces.items()
    }
    count = max(map(len, values.values()))
    jobs = [[*fixed, *(f"{key}={some[i % len(some)]}" for key, some in values.items())] for i in range(count)]
    return run_exp.experiments_of([[*job, "resume=true"] for job in jobs])


def _validate_numbers(count: int, seed: int) -> None:
    errors = []
    if not 1 <= count <= MOST_TRIALS:
        errors.append(f"Invalid --trials {count}: a search has 1 to {MOST_TRIALS} trials; give a number of runs.")
    if not 0 <= seed < 2**32:
        errors.append(f"Invalid --seed {seed}: use a whole number from 0 to {2**32 - 1}.")
    if errors:
        raise ConfigError(errors)


def _validate(objective: str, experiments: Sequence[Experiment]) -> None:
    """Checks the objective: settings are chosen by scores of validation rows.

    Raises:
        ConfigError: the objective is no such score.
    """
    errors = []
    benchmark, slash, _ = objective.partition("/")
    for experiment in experiments:
        dataset = experiment.dataset
        if objective == LOSS:
            if getattr(dataset, dataset.validation_key, None) == 0:
                errors.append(
                    f"Invalid --objective {LOSS} with dataset.{dataset.validation_key}=0: no row is held out; set "
                    f"dataset.{dataset.validation_key}."
                )
        elif not slash or benchmark not in experiment.eval:
            known = ", ".join([LOSS, *(f"{name}/METRIC" for name in experiment.eval)])
            errors.append(f"Invalid --objective {objective}: it is one of {known}; choose one.")
        elif dataset.evaluate != "validation":
            errors.append(
                f"Invalid --objective {objective} with dataset.evaluate={dataset.evaluate}: settings are chosen "
                "by validation rows, before the test rows are scored; set dataset.evaluate=validation."
            )
    if errors:
        raise ConfigError(errors)


def _objective_of(record: RunRecord, objective: str) -> float | None:
    """Returns the objective of a finished run; None if it has no value.

    Raises:
        ConfigError: runs have no metric of this name.
    """
    if objective not in record.metrics:
        near = nearest(objective, record.metrics)
        hint = f"did you mean {near}?" if near else f"known: {', '.join(record.metrics)}."
        raise ConfigError([f"Unknown --objective {objective}: {hint}"])
    return record.metrics[objective]


def _print(trials: Sequence[Trial], objective: str, direction: str) -> None:
    """Prints the trials, the best one first."""
    sign = 1 if direction == "minimize" else -1
    ordered = sorted(trials, key=lambda trial: (trial.objective is None, sign * (trial.objective or 0.0)))
    table = Table(title=Text(f"{objective} of {len(trials)} trials, the best first"), title_justify="left")
    for column in (objective, *trials[0].values, "run"):
        table.add_column(column, overflow="fold")
    for trial in ordered:
        value = "failed" if trial.objective is None else f"{trial.objective:.6g}"
        table.add_row(value, *map(str, trial.values.values()), Text(str(trial.folder.path)))
    printer = Console(highlight=False)
    (printer if printer.is_terminal else Console(highlight=False, width=170)).print(table)


if __name__ == "__main__":
    raise SystemExit(main())
