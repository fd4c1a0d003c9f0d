"""`python -m flatlora.plan model=… dataset=… [key=value …]`: memory and least time of a run, before it starts.

The same as `python run_exp.py model=… dataset=… [key=value …] plan=true`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main() -> None:
    """Replaces this process by run_exp.py, which knows the suite's data sets and options."""
    script = Path(__file__).parents[1] / "run_exp.py"
    os.execv(sys.executable, [sys.executable, str(script), *sys.argv[1:], "plan=true"])


if __name__ == "__main__":
    main()
