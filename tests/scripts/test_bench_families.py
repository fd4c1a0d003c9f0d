"""The contenders of bench.py families on a tiny T5: both train, on the same rows, and the clock sees their steps."""

import pytest

from scripts import bench_families

TINY = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 2}


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_families, "LEFT_OUT", 1)
    monkeypatch.setattr(bench_families, "WINDOW", 2)
    rows = "".join(f'{{"sentence": "Row {i} sings.", "label": {i % 2}, "idx": {i}}}\n' for i in range(64))
    folder = tmp_path / "data/nyu-mll/glue/cola"
    folder.mkdir(parents=True)
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text(rows)
    bench_families.write_t5(tmp_path / "t5", **TINY)
    words = bench_families.settings_of(tmp_path, 4, str(tmp_path / "data"), "cpu")
    return [*words, "optim.batch_size=4", "trainer.micro_batch_size=4"]


@pytest.mark.extra
def test_both_sides_train_and_are_timed(settings):
    times = [bench_families.stock(settings, tf32=False), bench_families.ours([*settings, "rho=flat"])]
    assert [len(seconds) for seconds in times] == [2, 2]  # steps 2 and 3, 4 and 5
    assert all(second > 0 for seconds in times for second in seconds)


def test_the_table_names_every_contender():
    one = {"step_s": [1.0, 2.0], "peak_gib": 4.0}
    table = bench_families.table_of(dict.fromkeys(bench_families.CONTENDERS, one))
    assert list(table.columns[0].cells) == list(bench_families.CONTENDERS)
    assert set(table.columns[2].cells) == {"1.000"}
