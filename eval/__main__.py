"""`python -m eval compare RUN_A RUN_B`; `python -m eval.NAME PATH` scores one model on one benchmark."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import eval as benchmarks
from eval import compare
from flatlora.utils.console import quiet_libraries, report_errors
from flatlora.utils.errors import ConfigError


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code: 0, or 2 for an invalid command line or invalid runs."""
    quiet_libraries()
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(f"{__doc__}\nBenchmarks: {', '.join(benchmarks.BENCHMARKS)}.")
        elif arguments[0] == "compare":
            compare.main(arguments[1:])
        else:
            raise ConfigError(
                [
                    f"Unknown command {arguments[0]}: use python -m eval compare RUN_A RUN_B, or python -m eval.NAME "
                    f"PATH, where NAME is one of {', '.join(benchmarks.BENCHMARKS)}."
                ]
            )
    except ConfigError as error:
        report_errors(error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
