"""The Triton kernels' logic on a machine without a GPU: test_kernels.py again, in Triton's interpreter.

A process of its own, since Triton reads TRITON_INTERPRET when it is imported. What the interpreter found once: an
address in a kernel's table whose tensor had been freed, which a GPU forgives for a while.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[3]


@pytest.mark.slow
@pytest.mark.extra  # that they compile is in tests/scripts/test_kernels_compile.py
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton (Linux, x86-64)")
def test_kernels_in_the_interpreter():
    chosen = "what_the_host_makes or row_norms or grouped or slices or transposed or (rounded_once and shape1) or gelu"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/flatlora/noise/test_kernels.py"]
    command += ["tests/flatlora/perturb/test_epsilon.py", "tests/flatlora/fused/test_quick_gelu.py"]
    done = subprocess.run(
        [
            *command,
            "-k",
            f"({chosen}) and not shape3 and not dtype1 and not ((shape4 or 264-256 or 1001) and not dtype0)",
        ],
        cwd=PROJECT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout[-3000:]
    assert int(passed.group(1)) > 25
