"""Runs an experiment in this process and writes when the phases of its start began and ended.

    python -m scripts.start_phases FILE STARTED WORD ...

`python -m scripts.bench start` calls it. STARTED is time.time() before the process was started; FILE becomes
{"phases": {name: [[began, ended] of each call]}, "ended": seconds}, in seconds since then. A phase includes the work
that it left to the GPU.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

FILE, STARTED, WORDS = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]


def main() -> int:
    import torch
    from transformers.trainer_callback import CallbackHandler

    import run_exp
    from flatlora.experiment import launch, run
    from flatlora.models import hashes, loading

    phases: dict[str, list[list[float]]] = {"imports": [[0.0, time.time() - STARTED]]}

    def now(wait: bool = True) -> float:
        if wait and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.time() - STARTED

    def watch(owner: Any, name: str, phase: str, *, wait: bool = True) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def watched(*args: Any, **kwargs: Any) -> Any:
            begun = now(wait)
            try:
                return original(*args, **kwargs)
            finally:
                phases.setdefault(phase, []).append([begun, now(wait)])

        setattr(owner, name, watched)

    watch(launch, "experiments_of", "configuration")
    watch(run, "prepare", "data and checks")
    watch(loading, "backbone_state", "hash of the files", wait=False)  # in a thread of its own
    watch(loading, "load_backbone", "weights")
    watch(hashes, "backbone_sha256", "hash of the backbone")
    watch(CallbackHandler, "on_step_begin", "step begins")
    watch(CallbackHandler, "on_step_end", "step ends")
    code = run_exp.main(WORDS)
    FILE.write_text(json.dumps({"phases": phases, "ended": now()}))
    return code


if __name__ == "__main__":
    sys.exit(main())
