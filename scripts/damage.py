"""Damages every file of a finished run, an interrupted run and the caches, and checks how their readers respond.

    python -m scripts.damage [-j N] [--sample N] [--seed N] [--only TEXT]

Each damage (truncate, empty, nest, flip, folder, link, mode, gone) of each file is applied to a fresh copy of the
folder. Then, depending on the file, the run is resumed, scored, put into tables and measured, or made from what is
cached, with models of two layers. A response is correct if its result is that of the undamaged folder, or if an error
or a warning names the file. N child processes take a share each. Prints counts of tracebacks, hangs of more than a
minute, silent differences, and writes outside results_root; exit code 1 unless all are 0.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pyarrow
import pyarrow.parquet
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import run_exp
from eval import command
from flatlora.experiment.run import EXIT_INTERRUPTED
from flatlora.inputs.rows import jsonl
from flatlora.runs.record import RunRecord
from flatlora.train.recorder import StepRecorder
from flatlora.utils.files import write_atomic
from flatlora.utils.staging import remove
from scripts import cells, flatness
from scripts.arguments import positive
from scripts.forked import ForkedRun

PROJECT = Path(__file__).parents[1]

PATIENCE_S = 60
ERRORS = ("traceback", "hang", "silent difference", "write outside")
SETTINGS = [
    "model.embedded=null",
    "model.dtype=float32",
    "wandb.mode=disabled",
    "wandb.name=run",
    "eval=[gsm8k]",
    "eval.gsm8k.max_new_tokens=4",
    "eval.gsm8k.batch_size=4",
    "optim.batch_size=4",
    "optim.lr=0.01",
    "optim.best_model=true",
    "optim.eval_steps=2",
    "trainer.micro_batch_size=4",
    "trainer.device=cpu",
    "trainer.save_steps=2",
    "trainer.max_steps=6",
    "dataset.train_rows=24",
    "dataset.validation_rows=4",
    "dataset.test_rows=4",
    "peft.lora_r=2",
]
MEASURED = ["--device", "cpu", "--rows", "4", "--draws", "1", "--sigmas", "0.1", "--parts", "rise"]


class Answer(NamedTuple):
    """The result of an action."""

    code: int
    output: str  # everything that it printed and logged
    result: Any  # must equal that of the undamaged folder


class Stage(NamedTuple):
    """A state of the work folder that is damaged, file by file.

    Args:
        make: creates this state in the empty work folder.
        damaged: returns the folder, inside the work folder, whose files are damaged.
        actions: {name: (action, prefixes of the files that it may read)}.
    """

    name: str
    make: Callable[[Path], None]
    damaged: Callable[[Path], Path]
    actions: Mapping[str, tuple[Callable[[Path], Answer], tuple[str, ...]]]


def main(words: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 without errors, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=positive, help="damages of each state, drawn at random; all by default")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--only", default="", help="damages whose name, such as finished adapter/x flip, has this text")
    parser.add_argument("-j", "--jobs", type=positive, default=1, help="processes that share the damages")
    options = parser.parse_args(words)
    counts, failed = Counter(), []
    with tempfile.TemporaryDirectory(prefix="damage-") as folder:
        children = []
        for number in range(options.jobs):
            share = Path(folder) / str(number)
            share.mkdir()
            (share / ERROR_LOG).touch()
            given = [str(share), options.sample, options.seed, options.only, number, options.jobs]
            children.append((share, ForkedRun([json.dumps(given)], share / "log", damage_share)))
        try:
            for _, child in children:
                child.wait()
        finally:
            for _, child in children:
                if child.poll() is None:
                    child.send_signal(signal.SIGKILL)
        for share, child in children:
            if child.poll():
                failed.append((share / "log").read_text()[-2000:])
            else:
                counts.update(json.loads((share / COUNTS).read_bytes()))
            print((share / ERROR_LOG).read_text(), end="")
    for log in failed:
        print(f"A child process ended early:\n{log}")
    print(f"{counts['damages']} damages, {counts['actions']} actions; {counts['named']} named, {counts['equal']} equal")
    print(", ".join(f"{counts[kind]} {kind}s" for kind in ERRORS))
    return int(bool(failed) or any(counts[kind] for kind in ERRORS))


COUNTS, ERROR_LOG = "counts.json", "errors"


def damage_share(arguments: list[str]) -> int:
    """Entry of a child process: runs its share of the damages in its own folder; writes counts and errors to it."""
    folder, sample, seed, only, number, jobs = json.loads(arguments[0])
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))
    root = Path(folder)
    with open(root / ERROR_LOG, "a") as errors, _own_cache(root / "cache"):

        def log_error(error: str) -> None:
            print(error, file=errors, flush=True)

        counts = damage_all(root / "all", sample, seed, only, log_error, (number, jobs))
    (root / COUNTS).write_text(json.dumps(counts))
    return 0


def damage_all(
    root: Path,
    sample: int | None,
    seed: int,
    only: str = "",
    on_error: Callable[[str], None] = print,
    share: tuple[int, int] = (0, 1),
) -> Counter[str]:
    """Counts of all outcomes over all states, including `ERRORS`; `on_error` is called for each error.

    Args:
        share: (number, count): of the damages, take number, number + count, and so on.
    """
    counts: Counter[str] = Counter()
    write_model(root / "model")
    work, outside = root / "work", root / "outside"
    for stage in stages(root / "model"):
        if " " in only and stage.name != only.partition(" ")[0]:
            continue
        remove(work)
        work.mkdir()
        stage.make(work)
        original = root / stage.name
        shutil.copytree(work, original, symlinks=True)
        expected = {}
        for name, (action, _) in stage.actions.items():
            _renew(work, original)
            expected[name], message = _answer(action, work)
            if message:
                raise RuntimeError(f"{stage.name}, undamaged, {name}: {expected[name].output}")
        top = stage.damaged(original)
        files = sorted(path.relative_to(top) for path in top.rglob("*") if path.is_file() and path.name != ".lock")
        cases = [(file, damage) for file in files for damage in DAMAGES]
        cases = [case for case in cases if only in f"{stage.name} {case[0]} {case[1]}"]
        if sample is not None and sample < len(cases):
            cases = sorted(random.Random(seed).sample(cases, sample))
        cases = cases[share[0] :: share[1]]
        for file, damage in cases:
            counts["damages"] += 1
            for name, (action, readers) in stage.actions.items():
                if not str(file).startswith(readers):
                    continue
                _renew(work, original)
                remove(outside)
                outside.mkdir()
                DAMAGES[damage](stage.damaged(work) / file, outside)
                before = _state(root, work)
                answer, message = _answer(action, work)
                counts["actions"] += 1
                kind = message or _judge(answer, expected[name], file)
                if kind not in ERRORS and _state(root, work) != before:
                    kind = "write outside"
                counts[kind] += 1
                if kind in ERRORS:
                    output = answer.output[-2000:]
                    on_error(f"{kind}: {stage.name} {file} {damage}, {name}: exit code {answer.code}\n{output}")
    return counts


def _judge(answer: Answer, expected: Answer, file: Path) -> str:
    if "Traceback (most recent call last)" in answer.output:
        return "traceback"
    output, expected_output = (_squeezed(each.output) for each in (answer, expected))
    named = any(output.count(name) > expected_output.count(name) for name in (str(file), file.name))
    if answer.code == expected.code and answer.result == expected.result:
        return "equal"
    return "named" if named else "silent difference"


def _squeezed(output: str) -> str:
    """The output without whitespace, which depends on the width of the console, and without the lines of scores."""
    return "".join("".join(line.split()) for line in output.splitlines() if "rows, scorer" not in line)


def _answer(action: Callable[[Path], Answer], work: Path) -> tuple[Answer, str | None]:
    """Runs an action; returns its answer, and "traceback", "hang" or None."""
    output, handler = io.StringIO(), logging.StreamHandler(stream := io.StringIO())
    logging.getLogger().addHandler(handler)
    previous = signal.signal(signal.SIGALRM, _on_alarm)
    signal.alarm(PATIENCE_S)
    message, answer = None, Answer(-1, "", None)
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            answer = action(work)
    except _TooLong:
        message = "hang"
    except (Exception, SystemExit):
        message = "traceback"
        output.write(traceback.format_exc())
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
        logging.getLogger().removeHandler(handler)
    return answer._replace(output=answer.output + output.getvalue() + stream.getvalue()), message


class _TooLong(BaseException):
    """Not an Exception, so that no code catches it as an error."""


def _on_alarm(*_: Any) -> None:
    raise _TooLong


# --- damages: (the file, a folder outside of everything)


def _truncate(path: Path, outside: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def _nest(path: Path, outside: Path) -> None:
    path.write_text("[" * 2_000)


def _flip(path: Path, outside: Path) -> None:
    data = bytearray(path.read_bytes())
    if data:
        data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _folder(path: Path, outside: Path) -> None:
    path.unlink()
    path.mkdir()


def _link(path: Path, outside: Path) -> None:
    path.rename(outside / path.name)
    path.symlink_to(outside / path.name)


DAMAGES: Mapping[str, Callable[[Path, Path], None]] = {
    "truncate": _truncate,
    "empty": lambda path, outside: path.write_bytes(b"") and None,
    "nest": _nest,
    "flip": _flip,
    "folder": _folder,
    "link": _link,
    "mode": lambda path, outside: path.chmod(0),
    "gone": lambda path, outside: path.unlink(),
}


# --- states and actions


def stages(model: Path) -> list[Stage]:
    """The states that are damaged."""
    adapted = ("adapter/", "config.yaml", "run.json", "classes.json")
    return [
        Stage(
            "finished",
            lambda work: _succeed(_trained(model, work)),
            _run,
            {
                "resume": (lambda work: _trained(model, work, "resume=true"), ("",)),
                "eval": (_scored, (*adapted, "test.jsonl", "eval/")),
                "tables": (_tabled, ("",)),
                "flatness": (_measured, (*adapted, "test.jsonl")),
            },
        ),
        Stage(
            "interrupted",
            lambda work: _interrupted(model, work),
            _run,
            {
                "resume": (lambda work: _trained(model, work, *_START, "resume=true"), ("",)),
                "eval": (_scored_checkpoint, ("checkpoint-4/", "start/", "config.yaml", "run.json", "test.jsonl")),
            },
        ),
        Stage(
            "cached",
            lambda work: [_succeed(_trained_with_cache(name, model, work)) for name in CACHED] and None,
            lambda work: work / "cache",
            {name: (partial(_trained_with_cache, name, model), folders) for name, (folders, _) in CACHED.items()},
        ),
    ]


CACHED: Mapping[str, tuple[tuple[str, ...], list[str]]] = {  # {name: (folders of the cache, settings of a run)}
    "tokens": (("data/",), ["dataset=gsm8k"]),
    "images": (
        ("images/", "decoded/", "random-clip"),
        [
            "model=clip_tiny",
            "dataset=mnist",
            "eval=[]",
            "dataset.validation_rows=4",
            "trainer.max_steps=2",
            "optim.warmup_ratio=0",
        ],
    ),
    "pictures": (
        ("latents/", "random-sdxl"),
        ["model=sdxl_tiny", "dataset=shapes", "eval=[]", "trainer.max_steps=1"],
    ),
}


_START = ("peft=pissa", "peft.lora_r=2")  # a method that saves an initial adapter


def write_model(folder: Path) -> None:
    """A random Llama of two layers with a tokenizer of bytes."""
    end = "<|endoftext|>"
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), end]
    backend = Tokenizer(BPE({text: number for number, text in enumerate(alphabet)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, pad_token=end, model_max_length=2048)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=2048, **shape)
        config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _trained(model: Path, work: Path, *more: str) -> Answer:
    code = run_exp.main([*SETTINGS, f"model.hub_id={model}", f"results_root={work / 'results'}", *more])
    return Answer(code, "", _results(_run(work)) if code == 0 else None)


def _trained_with_cache(name: str, model: Path, work: Path) -> Answer:
    """Runs a separate training that uses $FLATLORA_CACHE, in a folder below the work folder's results."""
    own, rows = work / "results" / name, work / "results/data"
    if not rows.exists():
        _write_rows(rows)
    settings = [*CACHED[name][1], f"data_root={rows}", f"results_root={own / 'results'}", "overwrite=true"]
    settings += ["wandb.mode=disabled", "wandb.name=run", "trainer.device=cpu"]
    if name == "tokens":
        settings = [*SETTINGS, f"model.hub_id={model}", *settings]
    with _own_cache(work / "cache"):
        code = run_exp.main(settings)
    return Answer(code, "", _results(_run(own)) if code == 0 else None)


def _write_rows(folder: Path) -> None:
    """Writes rows of GSM8K and images of MNIST, in the layout of data_root."""
    for split, count in (("train", 40), ("test", 8)):
        rows = [{"question": f"{split} {number}?", "answer": f"#### {number}"} for number in range(count)]
        (folder / "openai/gsm8k/main").mkdir(parents=True, exist_ok=True)
        write_atomic(folder / f"openai/gsm8k/main/{split}.jsonl", jsonl(rows))
        pictures = []
        for number in range(count):
            Image.new("L", (28, 28), number + count).save(buffer := io.BytesIO(), "PNG")
            pictures.append({"bytes": buffer.getvalue(), "path": None})
        table = pyarrow.table({"image": pictures, "label": [number % 10 for number in range(count)]})
        (folder / "ylecun/mnist/mnist").mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(table, folder / f"ylecun/mnist/mnist/{split}.parquet")


def _interrupted(model: Path, work: Path) -> None:
    plain = StepRecorder.on_step_end

    def interrupt(recorder: StepRecorder, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        plain(recorder, args, state, control, **kwargs)
        if state.global_step == 5:
            raise KeyboardInterrupt

    with mock.patch.object(StepRecorder, "on_step_end", interrupt), contextlib.redirect_stdout(io.StringIO()):
        answer = _trained(model, work, *_START)
    if answer.code != EXIT_INTERRUPTED:
        raise RuntimeError(f"the run that is interrupted ended with exit code {answer.code}")


def _scored(work: Path) -> Answer:
    run = _run(work)
    code = command.main("gsm8k", [str(run), "device=cpu"])
    return Answer(code, "", _answers(run / "eval/gsm8k") if code == 0 else None)


def _scored_checkpoint(work: Path) -> Answer:
    run = _run(work)
    code = command.main("gsm8k", [str(run / "checkpoint-4"), "device=cpu"])
    return Answer(code, "", _answers(run / "eval/gsm8k-checkpoint-4") if code == 0 else None)


def _tabled(work: Path) -> Answer:
    runs, problems = cells.read_runs(work / "results")
    return Answer(0, "\n".join(problems), [(run.metrics, run.experiment.model_dump(mode="json")) for run in runs])


def _measured(work: Path) -> Answer:
    run = _run(work)
    code = flatness.main([str(run), *MEASURED])
    parts = json.loads((run / flatness.FILE).read_bytes())["parts"] if code == 0 else {}
    return Answer(code, "", [(part["loss"], part["draws"]) for part in parts.values()])


def _succeed(answer: Answer) -> None:
    if answer.code:
        raise RuntimeError(f"the undamaged run ended with exit code {answer.code}")


def _run(work: Path) -> Path:
    return next((work / "results").glob("*/*/*"))


def _results(run: Path) -> Any:
    """Returns the results of a run without times and speeds."""
    record = RunRecord.read(run)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [{key: value for key, value in row.items() if not key.endswith("_per_s")} for row in rows]
    weights = sorted((run / "adapter").glob("*.safetensors"))
    adapter = [hashlib.sha256(path.read_bytes()).hexdigest() for path in weights]
    return record.status, record.metrics, rows, adapter, list(map(_answers, sorted(run.glob("eval/*"))))


def _answers(folder: Path) -> Any:
    score = json.loads((folder / "score.json").read_bytes())
    return score["metrics"], (folder / "predictions.jsonl").read_bytes()


def _renew(work: Path, original: Path) -> None:
    for path in work.rglob("*"):
        if not path.is_symlink():
            path.chmod(0o700)
    remove(work)
    shutil.copytree(original, work, symlinks=True)


def _state(root: Path, work: Path) -> dict[str, tuple[int, int, str]]:
    """Returns the files that must not change: in `root` outside of the work folder and the cache, and in results/."""
    state = {}
    for path in [*root.rglob("*"), *(PROJECT / "results").glob("*")]:
        if path.is_file() and not path.is_symlink() and not path.is_relative_to(root / "cache"):
            if path.is_relative_to(work / "results") or path.is_relative_to(work / "cache"):
                continue
            stat = path.stat()
            small = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_relative_to(root / "outside") else ""
            state[str(path)] = (stat.st_size, stat.st_mtime_ns, small)
    return state


@contextlib.contextmanager
def _own_cache(folder: Path) -> Iterator[None]:
    with mock.patch.dict(os.environ, {"FLATLORA_CACHE": str(folder)}):
        yield


if __name__ == "__main__":
    begun = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that children and folders are removed
    code = main()
    print(f"{time.monotonic() - begun:.0f} s")
    sys.exit(code)
