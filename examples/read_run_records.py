"""What runs left behind: a line for each run.json below a folder.

python examples/read_run_records.py [FOLDER]        # default: the runs of the study that are kept in results/study
"""

import sys
from pathlib import Path

from flatlora.runs.record import RunRecord


def main(folder: Path) -> list[tuple[str, ...]]:
    """Prints and returns (data set, method, σ, seed, metrics, backbone) of each finished run."""
    rows = []
    for path in sorted(folder.rglob("run.json")):
        record = RunRecord.read(path.parent)
        if not record.is_finished:
            continue
        experiment = record.experiment
        scores = {name: value for name, value in record.metrics.items() if "/" in name and not name.endswith("/n")}
        rows.append(
            (
                experiment["dataset"]["name"],
                experiment["peft"]["name"],
                f"{experiment['rho']['name']} {experiment['rho']['sigma']:g}",
                str(experiment["seed"]),
                "  ".join(f"{name} {value:.3f}" for name, value in scores.items() if isinstance(value, float)),
                "unchanged" if record.backbone_sha256.unchanged else "CHANGED",
            )
        )
    for row in rows:
        print(f"{row[0]:8} {row[1]:10} {row[2]:12} seed {row[3]:3} backbone {row[5]}  {row[4]}")
    return rows


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "results/study"))
