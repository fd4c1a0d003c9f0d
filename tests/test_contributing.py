"""CONTRIBUTING.md's examples as they are printed: they pass lint and their tests, and a run with all is scored."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.forked import ForkedRun
from tests.conftest import run_folder

PROJECT = Path(__file__).parents[1]
# A path on a line of its own, then the whole file as a block.
FILE = re.compile(r"^`([\w/.]+)`\n\n```(?:python|yaml)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def write_examples(folder: Path) -> list[str]:
    """Writes each file of CONTRIBUTING.md below `folder`; returns their paths."""
    examples = FILE.findall((PROJECT / "CONTRIBUTING.md").read_text())
    for name, text in examples:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return [name for name, _ in examples]


def run_examples(words: list[str]) -> int:
    """In a process of its own, whose packages have the examples' modules too: the examples' tests, then a run."""
    import data
    import eval as benchmarks
    import run_exp
    from flatlora.methods import adapters, regularizers

    folder, *settings = words
    adapters.__path__.append(f"{folder}/flatlora/methods/adapters")
    regularizers.__path__.append(f"{folder}/flatlora/methods/regularizers")
    data.__path__.append(f"{folder}/data")
    benchmarks.__path__.append(f"{folder}/eval")
    options = ["-q", "-p", "no:cacheprovider", "--rootdir", folder, "-c", "/dev/null"]
    fixtures = ["-p", "tests.conftest", "-p", "tests.flatlora.methods.conftest"]
    failed = pytest.main([*options, *fixtures, f"{folder}/tests"])
    return int(failed) or run_exp.main(["--config-dir", f"{folder}/conf", *settings])


@pytest.mark.extra
@pytest.mark.slow
def test_the_examples_pass_their_tests_and_train_a_run(tmp_path, tiny_settings):
    names = write_examples(tmp_path / "examples")
    assert len(names) == 12
    for check in (("check",), ("format", "--check")):
        ruff = [sys.executable, "-m", "ruff", *check, "--config", str(PROJECT / "pyproject.toml")]
        subprocess.run([*ruff, str(tmp_path / "examples")], check=True)
    settings = [word for word in tiny_settings if word != "eval=[]"]
    settings += ["peft=orthogonal", "peft.gain=0.5", "dataset=sums", "dataset.largest=50"]
    settings += ["rho=gradient_noise", "rho.gamma=0", "eval=[gsm8k,closeness]"]
    settings += ["eval.gsm8k.max_new_tokens=4", "eval.closeness.max_new_tokens=4", "eval.closeness.tolerance=0.05"]
    log = tmp_path / "log"
    assert ForkedRun([str(tmp_path / "examples"), *settings], log, run_examples).wait(240) == 0, log.read_text()
    assert "6 passed" in log.read_text()
    folder = run_folder(settings)
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["experiment"]["peft"]["gain"] == 0.5
    assert record["backbone_sha256"]["before"] == record["backbone_sha256"]["after"]
    for benchmark in ("gsm8k", "closeness"):
        assert json.loads((folder / f"eval/{benchmark}/score.json").read_text())["n"] == 4
