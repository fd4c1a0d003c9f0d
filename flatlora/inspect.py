"""`python -m flatlora.inspect PATH ...` prints what a run, checkpoint, adapter or model is; no weights are loaded."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flatlora.inputs.rows import gather
from flatlora.trained import description
from flatlora.trained.place import ResolvedModel, resolve_model
from flatlora.utils.console import quiet_libraries, report_errors
from flatlora.utils.errors import ConfigError


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 if a path is invalid."""
    parser = argparse.ArgumentParser(prog="python -m flatlora.inspect", description=__doc__)
    parser.add_argument("paths", nargs="+", metavar="PATH")
    options = parser.parse_args(arguments)
    quiet_libraries()
    try:
        tables = gather(*(lambda path=path: table(path) for path in options.paths))
    except ConfigError as error:
        report_errors(error)
        return 2
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=150)
    for path, each in zip(options.paths, tables, strict=True):
        console.print(path, markup=False, soft_wrap=True)
        console.print(each)
    return 0


def table(path: str) -> Table:
    """Returns one row per fact and score of the model at a path.

    Raises:
        ConfigError: there is no such model, or files of its run are damaged.
    """
    resolved = local_model(path)
    rows = description.facts(resolved)
    if (record := description.record_of(resolved)) is not None:
        rows |= {
            f"{score.benchmark} {score.metric}": f"{score}" + (f", n = {score.n:,}" if score.n else "")
            for score in description.scores(record)
        }
    rows["size"] = description.size_on_disk(Path(resolved.weights))
    shown = Table(show_header=False)
    shown.add_column(no_wrap=True)
    shown.add_column(overflow="fold")
    for name, value in rows.items():
        shown.add_row(name, Text(value))
    return shown


def local_model(path: str, base: str | None = None) -> ResolvedModel:
    """Returns `resolve_model` of a folder.

    Raises:
        ConfigError: it is no folder, or as `resolve_model`.
    """
    if not Path(path).is_dir():
        raise ConfigError([f"Invalid path {path}: no such folder; name a run, checkpoint, adapter or model folder."])
    return resolve_model(path, base=base)


if __name__ == "__main__":
    sys.exit(main())
