"""Output for users: progress bars on a terminal (lines elsewhere), errors, tables, and filtered warnings."""

from __future__ import annotations

import contextlib
import logging
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from flatlora.utils.errors import ConfigError
from flatlora.utils.masking import masked
from flatlora.utils.names import printable

console = Console(stderr=True, highlight=False, emoji=False)  # emoji=True would replace :on: in a name such as a:on:b
_SECONDS_BETWEEN_LINES = 5.0


class ProgressBar:
    """A named progress bar; `update` takes the number of units done and numbers to show.

    If the output is not a terminal, a plain line is printed at most every 5 s instead.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._bar: RichProgress | None = None
        self._total: int | None = None
        self._last_line = 0.0

    def start(self, total_steps: int | None, step: int = 0) -> None:
        self._total, self._last_line = total_steps, time.monotonic()
        if not console.is_terminal:
            console.print(f"{self.name}: {self._count(step)}", markup=False, soft_wrap=True)
            return
        self._bar = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console,
        )
        self._bar.start()
        self._task = self._bar.add_task(self.name, total=total_steps, completed=step, numbers="")

    def update(self, step: int, row: dict[str, Any] | None = None) -> None:
        numbers = _numbers(row or {})
        if self._bar:
            self._bar.update(self._task, completed=step, numbers=numbers)
        elif step == self._total or time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            console.print(f"{self.name}: {self._count(step)}  {numbers}", markup=False, soft_wrap=True)

    def _count(self, step: int) -> str:
        return str(step) if self._total is None else f"{step}/{self._total}"

    def stop(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None


@contextlib.contextmanager
def progress(name: str, total: int | None, *, least: int = 0) -> Iterator[Callable[[int], None]]:
    """A progress bar; yields a function to call with the number of units that were completed since the last call.

    Args:
        total: number of units; None if unknown.
        least: no bar is shown for fewer units, which are done before it could be read.
    """
    if total is not None and total < least:
        yield lambda count: None
        return
    bar, done = ProgressBar(name), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        bar.update(done)

    bar.start(total)
    try:
        yield advance
    finally:
        bar.stop()


_SHOWN = {"loss": "loss {:.3f}", "sigma": "σ {:.3f}", "eval_loss": "eval {:.3f}", "score": "right {:.0%}"}


def _numbers(row: dict[str, Any]) -> str:
    return "  ".join(text.format(row[key]) for key, text in _SHOWN.items() if row.get(key) is not None)


def report_errors(error: ConfigError) -> None:
    """Print all errors of a configuration."""
    count = len(error.errors)
    console.print(f"[bold red]{count} error{'s' if count > 1 else ''}: nothing was loaded or written.[/]")
    for number, message in enumerate(error.errors, start=1):
        console.print(f"  {number}. {message}", markup=False, soft_wrap=True)


def report_failure(error: Exception) -> None:
    """Print why a run failed: the message if it is enough for a user, else the traceback."""
    if isinstance(error, FloatingPointError | MemoryError | OSError):
        reason = printable(masked(str(error)))
        console.print(Text("The run failed: ", "bold red") + Text(reason), soft_wrap=True)
    else:
        console.print_exception()


def print_pairs(title: str, pairs: Iterable[tuple[str, str]]) -> None:
    """Print a two-column table to standard output."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(Text(name, "bold"), Text(value))
    Console(highlight=False).print(table)


_LIBRARIES = r"(torch|transformers|peft|accelerate|numba|gguf|hydra|huggingface_hub|diffusers)"
# Warnings of these libraries that do not concern a result, by the beginning of their text.
_NOISE = (
    "Could not find a config file in ",  # PEFT, offline: it cannot compare vocabularies, which never change here
    "Unable to fetch remote file",
    "'pin_memory' argument is set as true",
    "User provided device_type of 'cuda', but CUDA is not available",
    "Was asked to gather along dimension 0",
    "The PyTorch API of nested tensors",
    "The TBB threading layer requires",
    "Setting `save_embedding_layers` to `True`",
    "fan_in_fan_out is set to ",
)
# Warnings that mean that a loaded model is not the saved one; they are raised as errors.
_WRONG_RESULT = (
    "Found missing adapter keys while loading the checkpoint",
    "Some weights of .* were not initialized from the model checkpoint",
    "Adapter .* tensor\\(s\\) have invalid shape",
)
# Messages that transformers only logs but that mean wrong results of a model or tokenizer.
_DECIDES = re.compile(
    r"incorrect regex pattern|will NOT tie them|checkpoint seem corrupted|rope_parameters|rope_scaling"
    r"|instantiate a model of type|must be `None` or an integer within the vocabulary|is unrecognized"
    r"|right-padding was detected|Automatically falling back to"
)


def quiet_libraries() -> None:
    """Show warnings of this project and of libraries as single lines, and only this project's progress bars.

    Deprecation warnings of libraries and those in `_NOISE` are hidden. Warnings that a model was not loaded as it was
    saved are raised as errors. All others are shown.
    """
    import datasets
    import transformers

    handler = RichHandler(console=console, show_time=False, show_path=False, markup=False)
    handler.setFormatter(_SafeFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(True)
    warnings.formatwarning = _one_line
    _show_decisive(transformers.utils.logging, handler)
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # each retry is a warning of three lines
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # four warnings for each of a benchmark's 85 tasks
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # likewise, of a server of MLflow
    logging.getLogger("wandb").setLevel(logging.CRITICAL)  # tracebacks of its service; Wandb reports the error
    datasets.disable_progress_bars()
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ResourceWarning):
        warnings.filterwarnings("ignore", category=category, module=_LIBRARIES)
    for text in _NOISE:
        warnings.filterwarnings("ignore", message=re.escape(text))
    for pattern in _WRONG_RESULT:
        warnings.filterwarnings("error", message=pattern)


class _SafeFormatter(logging.Formatter):
    """Masks passwords, and spells control characters: a message may quote the command line, or an endpoint's reply."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(masked(super().format(record)))


def _show_decisive(library: Any, handler: logging.Handler) -> None:
    """Let transformers log errors, and those of its warnings that match `_DECIDES`."""
    own = logging.getLogger("transformers")
    library.set_verbosity_warning()
    own.propagate = False  # if the variable CI is set, transformers also passes everything to the root logger
    shown = RichHandler(console=console, show_time=False, show_path=False, markup=False)
    shown.setFormatter(handler.formatter)
    shown.addFilter(lambda record: record.levelno >= logging.ERROR or bool(_DECIDES.search(record.getMessage())))
    own.handlers = [shown]


def _one_line(message: Warning | str, category: type[Warning], *place: Any) -> str:
    return f"{category.__name__}: {' '.join(str(message).split())}"
