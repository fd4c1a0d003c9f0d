"""`bench.py start`: its phases add up, and a second run compiles nothing."""

import json

import pytest

from scripts import bench_start

PHASES = {
    "imports": [[0.0, 5.0]],
    "configuration": [[5.5, 6.0]],
    "data and checks": [[6.1, 8.0]],
    "hash of the files": [[8.0, 13.0]],
    "weights": [[8.5, 11.0]],
    "hash of the backbone": [[12.0, 12.5], [20.0, 20.75]],
    "step begins": [[14.0, 14.0], [16.0, 16.0]],
    "step ends": [[15.5, 15.75], [17.0, 17.0]],
}


def test_phases_add_up():
    seconds = bench_start.seconds_of(PHASES, 22.0)
    parts = list(seconds.values())[: list(seconds).index("to the first step")]
    assert sum(parts) == seconds["to the first step"] == 15.75
    assert [seconds[name] for name in ("first step", "hash after training")] == [1.75, 0.75]
    runs = [{"seconds": seconds, "compiled": {"triton": 3 - 3 * i, "numba": 0}} for i in range(2)]
    table = bench_start.table_of(runs, "small")
    assert list(table.columns[0].cells) == [*seconds, "compiled by triton", "compiled by numba"]
    assert list(table.columns[2].cells)[-2:] == ["0", "0"]


@pytest.mark.extra
def test_a_second_run_compiles_nothing(tmp_path):
    assert bench_start.run("small", out=tmp_path) == 0
    first, second = json.loads((tmp_path / "start_small.json").read_bytes())["runs"]
    assert first["compiled"]["numba"] > 0
    assert second["compiled"] == {"triton": 0, "numba": 0}
