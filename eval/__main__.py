"""`python -m eval compare RUN_A RUN_B`; `python -m eval.NAME PATH` scores one model on one benchmark."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import eval as benchmarks
from eval import compare
from flatlora.utils.console import quiet_libraries, report_errors
from flatlora.utils.errors import ConfigError


def main(words: Sequence[str]) -> int:
    """Exit code: 0 done, 2 an error of the words or of what they name."""
    quiet_libraries()
    try:
        if not words or words[0] in ("-h", "--help"):
            print(f"{__doc__}\nBenchmarks: {', '.join(benchmarks.BENCHMARKS)}.")
        elif words[0] == "compare":
            compare.main(words[1:])
        else:
            raise ConfigError(
                [
                    f"Unknown command {words[0]}: python -m eval compare RUN_A RUN_B, or python -m eval.NAME PATH with "
                    f"one of {', '.join(benchmarks.BENCHMARKS)}."
                ]
            )
    except ConfigError as error:
        report_errors(error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
