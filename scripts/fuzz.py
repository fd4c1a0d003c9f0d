"""Fuzzes the command line: lines from the grammar of settings, and real lines with errors.

    python -m scripts.fuzz [--lines 1000] [--seed 2026] [-j N]

Every line runs with run_exp.main and dry_run=true, or with a benchmark's command and score_only=true, so that nothing
is loaded and nothing should be written. Each batch of lines is a child process, N at a time. A line that makes no
progress for a minute counts as a hang; its process is killed, and the rest of the batch continues. Prints the number of
lines by exit code, and all lines that ended in a traceback or a hang, wrote a file, or would have written outside
results_root; exit code 1 if there are any.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import os
import random
import re
import shlex
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import matplotlib  # noqa: F401 - creates its folders at the first import, which must not count as a write of a line
import yaml

import data
import eval as benchmarks
import run_exp
from eval import command
from flatlora import methods
from flatlora.config.sections import DiffusionModelConfig, OptimConfig, TrainerConfig
from flatlora.experiment import (
    commandline,
    launch,
    run,
)
from flatlora.runs.run_folder import RunFolder
from flatlora.train import distributed
from flatlora.utils import names
from scripts.arguments import positive
from scripts.forked import ForkedRun

PROJECT = Path(__file__).parents[1]

HANG_S = 60
BATCH = 50
_EVAL_SHARE = 0.2  # share of lines for a benchmark's command

WORDS = yaml.safe_load(Path(__file__).with_name("fuzz_words.yaml").read_text(encoding="utf-8"))
LONG = ["9" * 320, "9" * 5000, "漢" * 100, "é" * 60, "n" * 101, "n" * 300, "x" * 20_000, "${seed}" * 30, "b\udcff"]
LONG += ["[" * 30 + "]" * 30, "[" * 2000 + "]" * 2000, "{a:" * 40, ",".join(map(str, range(400)))]
LONG += ["[" + ",".join(f"m{i}" for i in range(20_000)) + "]"]
VALUES = [WORDS["numbers"], WORDS["places"], WORDS["texts"], WORDS["grammar"], LONG]


@dataclass
class Outcome:
    """The outcome of one command line."""

    command: str
    code: int | str | None
    seconds: float
    output: str = ""  # empty without a traceback
    wrote: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)

    @property
    def is_fine(self) -> bool:
        return not (self.output or self.wrote or self.outside)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=positive, default=1000)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("-j", "--jobs", type=positive, default=1, help="batches at a time")
    options = parser.parse_args(words)
    lines = draw_lines(options.lines, options.seed)
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        outcomes, hangs = [], []
        batches = {folder / str(start): lines[start : start + BATCH] for start in range(0, len(lines), BATCH)}
        with ThreadPoolExecutor(options.jobs) as pool:
            for ended, hung in pool.map(run_batch, batches.values(), batches):
                outcomes += ended
                hangs += hung
                print(f"{len(outcomes) + len(hangs)}/{len(lines)}", file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return report(outcomes, hangs, options.seed)


def report(outcomes: Sequence[Outcome], hangs: Sequence[str], seed: int) -> int:
    """Print the counts and all failures; returns the exit code."""
    codes = collections.Counter(str(outcome.code) for outcome in outcomes)
    ended = ", ".join(f"{count} with exit code {code}" for code, count in codes.most_common())
    slowest = max((outcome.seconds for outcome in outcomes), default=0.0)
    print(f"{len(outcomes) + len(hangs)} command lines (seed {seed}): {ended}; the slowest took {slowest:.1f} s")
    for outcome in outcomes:
        if not outcome.is_fine:
            written = f"wrote {outcome.wrote}, outside {outcome.outside}"
            print(f"- {outcome.command[:500]}\n  {written}\n{outcome.output[-2000:]}")
    for line in hangs:
        print(f"- hangs: {line[:500]}")
    tracebacks = sum(bool(outcome.output) for outcome in outcomes)
    writes = sum(bool(outcome.wrote or outcome.outside) for outcome in outcomes)
    print(f"{tracebacks} tracebacks, {len(hangs)} hangs over {HANG_S} s, {writes} writes outside results_root")
    return 1 if tracebacks or hangs or writes else 0


def draw_lines(count: int, seed: int) -> list[list[str]]:
    """Command lines; the first word of each is run_exp or a benchmark."""
    draw, real = random.Random(seed), real_lines()
    keys = setting_keys()
    lines = []
    while len(lines) < count:
        if draw.random() < _EVAL_SHARE:
            lines.append(_eval_line(draw))
        elif draw.random() < 0.5:
            lines.append(["run_exp", *_generated_line(draw, keys)])
        else:
            lines.append(["run_exp", *_mutated_line(draw, draw.choice(real), keys)])
    return lines


def real_lines() -> list[list[str]]:
    """The run_exp.py commands in README.md, docs/ and conf/experiment."""
    pages = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
    files = [*pages, *sorted((PROJECT / "conf/experiment").rglob("*.yaml"))]
    texts = [path.read_text() for path in files]
    commands = [line for text in texts for line in re.findall(r"^(?:# )?python run_exp\.py +(.+)$", text, re.MULTILINE)]
    lines = [shlex.split(line.rstrip("\\"), comments=True) for line in commands]
    return [line for line in lines if line]


def setting_keys() -> list[str]:
    """All keys of all options, as group.key."""
    plain = commandline.compose_config(run_exp.SUITE.conf_dir, [])
    keys = [f"{group}.{key}" for group, section in plain.items() if isinstance(section, dict) for key in section]
    keys += [key for key, section in plain.items() if not isinstance(section, dict)]
    owners = [("peft", methods.ADAPTERS[name]) for name in list(methods.ADAPTERS)]
    owners += [("rho", methods.REGULARIZERS[name]) for name in list(methods.REGULARIZERS)]
    owners += [("dataset", data.DATASETS[name]) for name in data.DATASETS]
    owners += [(f"eval.{name}", benchmarks.BENCHMARKS[name]) for name in benchmarks.BENCHMARKS]
    keys += [f"{group}.{key}" for group, owner in owners for key in owner.Config.model_fields]
    for group, cls in (("model", DiffusionModelConfig), ("optim", OptimConfig), ("trainer", TrainerConfig)):
        keys += [f"{group}.{key}" for key in cls.model_fields]
    return sorted(set(keys))


def _value(draw: random.Random) -> str:
    return draw.choice(draw.choice(VALUES))


def _generated_line(draw: random.Random, keys: Sequence[str]) -> list[str]:
    words = [_word(draw, keys) for _ in range(draw.randint(1, 4))]
    if draw.random() < 0.3:
        words[:0] = draw.choice(WORDS["flags"]).split()
    return words


def _word(draw: random.Random, keys: Sequence[str]) -> str:
    """One override from the grammar: an option of a group, a value of a key, or an almost valid form."""
    kind, value = draw.random(), _value(draw)
    if kind < 0.15:
        group = draw.choice(commandline.GROUPS)
        return f"{group}={draw.choice([*_option_names(group), value])}"
    if kind < 0.22:
        return f"{draw.choice(WORDS['hydra'])}={value}"
    key = draw.choice(keys)
    if kind < 0.3:
        forms = [
            key,
            f"~{key}",
            f"{key}@x={value}",
            f"={value}",
            f"{key}..x={value}",
            f"{key}[0]={value}",
            value,
            f"model@{key}=smollm",
        ]
        return draw.choice(forms)
    return f"{draw.choice(['', '', '', '+', '++'])}{key}={value}"


def _option_names(group: str) -> list[str]:
    return [path.stem for path in sorted((run_exp.SUITE.conf_dir / group).rglob("*.yaml"))]


def _mutated_line(draw: random.Random, line: Sequence[str], keys: Sequence[str]) -> list[str]:
    """A real line with one to three errors."""
    words = list(line)
    for _ in range(draw.randint(1, 3)):
        index = draw.randrange(len(words))
        kind = draw.randrange(7)
        if kind == 0:
            words[index] = _mutated_word(draw, words[index])
        elif kind == 1:
            words[index] = f"{words[index].partition('=')[0]}={_value(draw)}"
        elif kind == 2:
            words.insert(index, words[draw.randrange(len(words))])
        elif kind == 3:
            words.insert(index, _word(draw, keys))
        elif kind == 4:
            words.insert(index, draw.choice(WORDS["flags"]).split()[0])
        elif kind == 5:
            words += [words[index]] * 50
        elif len(words) > 1:
            del words[index]
    return words


def _mutated_word(draw: random.Random, word: str) -> str:
    """A word with a character inserted, removed or replaced, or the word cut or repeated."""
    if not word:
        return draw.choice(WORDS["signs"])
    index, sign = draw.randrange(len(word)), draw.choice(WORDS["signs"])
    return draw.choice(
        [
            word[:index] + sign + word[index:],
            word[:index] + word[index + 1 :],
            word[:index] + sign + word[index + 1 :],
            word[:index],
            word * draw.choice([2, 100]),
        ]
    )


def _eval_line(draw: random.Random) -> list[str]:
    name = draw.choice(list(benchmarks.BENCHMARKS))
    known = [*command.Target.model_fields, *benchmarks.BENCHMARKS[name].Config.model_fields, "nope"]
    words = [f"{draw.choice(known)}={_value(draw)}" for _ in range(draw.randint(0, 4))]
    if draw.random() < 0.3:
        words = [_mutated_word(draw, word) for word in words]
    return [name, draw.choice([*WORDS["paths"], "漢" * 200, "a\udcff"]), *words]


def run_batch(lines: list[list[str]], folder: Path) -> tuple[list[Outcome], list[str]]:
    """Try lines in child processes; returns (outcomes, lines that hung)."""
    folder.mkdir(parents=True)
    outcomes, hangs, done = [], [], 0
    while done < len(lines):
        todo, results = folder / f"todo-{done}.json", folder / f"outcomes-{done}.jsonl"
        todo.write_text(json.dumps(lines[done:]))
        results.touch()
        child = ForkedRun([str(todo), str(results), str(folder / "cwd")], folder / "log", try_lines)
        while child.wait(0.2) is None:
            if time.time() - results.stat().st_mtime > HANG_S + (
                0 if results.stat().st_size else 60
            ):  # the first line also waits for the imports
                os.killpg(child.pid, 9)
        ended = [Outcome(**json.loads(row)) for row in results.read_text().splitlines()]
        outcomes += ended
        done += len(ended)
        if done < len(lines):  # the child ended within a line, which hung or ended the process
            hangs.append(_shown(lines[done]))
            done += 1
    return outcomes, hangs


def try_lines(words: list[str]) -> int:
    """Entry of a child process: try the lines of one file, and append each outcome as a row to another."""
    todo, results, folder = map(Path, words)
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    with open(results, "a", encoding="utf-8") as file:
        for line in json.loads(todo.read_text()):
            file.write(json.dumps(asdict(try_line(line))) + "\n")
            file.flush()
    return 0


def try_line(line: Sequence[str]) -> Outcome:
    """Try one command line in this process, in its working folder."""
    name, words = line[0], list(line[1:])
    output, begun, outside = io.StringIO(), time.monotonic(), []
    code: int | str | None = None
    with _nothing_loaded(outside), _watched_writes() as wrote, contextlib.redirect_stdout(output):
        try:
            with contextlib.redirect_stderr(output), mock.patch.object(sys, "argv", ["run_exp.py"]):
                if name == "run_exp":
                    code = run_exp.main([*words, "dry_run=true"])
                else:
                    code = command.main(name, [*words, "score_only=true"])
        except SystemExit as error:
            code = error.code or 0
        except _Loaded:
            code = "loads"
        except BaseException:
            output.write(traceback.format_exc())
    text = output.getvalue()
    failed = text if "Traceback" in text else ""
    return Outcome(_shown(line), code, round(time.monotonic() - begun, 2), failed, wrote, outside)


def _shown(line: Sequence[str]) -> str:
    return ascii(shlex.join(line))


class _Loaded(BaseException):
    """Raised where weights or data would be read, or processes started."""


@contextlib.contextmanager
def _nothing_loaded(outside: list[str]) -> Iterator[None]:
    """End runs before they load anything, and collect run folders that are outside of their results_root."""
    plain = launch.run

    def stop(*_: Any) -> None:
        raise _Loaded

    def check(suite: Any, experiment: Any, settings: Sequence[str]) -> int:
        root, path = (os.path.abspath(folder) for folder in (experiment.results_root, RunFolder.of(experiment).path))
        if os.path.commonpath([root, path]) != root or any(names.size(part) > 255 for part in path.split("/")):
            outside.append(path)
        return plain(suite, experiment, settings)

    with contextlib.ExitStack() as patches:
        for owner, name, stand_in in (
            (launch, "run", check),
            (run, "prepare", stop),
            (launch, "run_sweep", stop),
            (distributed, "launch", stop),
            (command, "_backend", stop),
        ):
            patches.enter_context(mock.patch.object(owner, name, stand_in))
        yield


_WRITES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod")
_watching: list[list[str]] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching or event not in ("open", *_WRITES):
        return
    path = arguments[0]
    if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        return
    if isinstance(path, str | bytes | os.PathLike) and not (event == "os.mkdir" and os.path.isdir(path)):
        name = os.fsdecode(path)
        if not name.startswith(("/dev/", "/proc/self/")) and "__pycache__" not in name:
            _watching[-1].append(f"{event} {name}")


@contextlib.contextmanager
def _watched_writes() -> Iterator[list[str]]:
    """Collects what Python writes, from its audit events; audit hooks cannot be removed, so there is only one."""
    if not getattr(_hook, "is_set", False):
        sys.addaudithook(_hook)
        _hook.is_set = True
    wrote: list[str] = []
    _watching.append(wrote)
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # Python's own writes, on a fresh machine
    try:
        yield wrote
    finally:
        sys.dont_write_bytecode = before
        _watching.remove(wrote)


if __name__ == "__main__":
    sys.exit(main())
