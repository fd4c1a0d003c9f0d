"""What runs wrote down: run.json, the result of a run, and metrics.jsonl, a row for each logged step.

    python examples/read_run_records.py [FOLDER METRIC]

FOLDER holds run folders (NAME/SEED) at any depth and METRIC is a key of run.json's metrics, train_loss for example;
without them the accuracy of the study that is kept in the repository is read.
"""

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

STUDY = Path(__file__).parents[1] / "results" / "study" / "flatlora_cola"
folder, metric = sys.argv[1:] or [STUDY, "glue/accuracy"]

scores = defaultdict(list)  # run name: the metric of each seed
for path in sorted(Path(folder).rglob("run.json")):
    record = json.loads(path.read_text())
    if record["status"] != "finished":
        print(f"{path.parent}: {record['status']}")
        continue
    if record["backbone_sha256"]["before"] != record["backbone_sha256"]["after"]:
        print(f"{path.parent}: the backbone changed during training")
    if metric in record["metrics"]:
        scores[path.parent.parent.name].append(record["metrics"][metric])

for name, values in scores.items():
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    print(f"{name:50} {metric} {statistics.mean(values):.4f}{spread}  ({len(values)} seeds)")

log = min(Path(folder).rglob("metrics.jsonl"))
rows = [json.loads(line) for line in log.read_text().splitlines()]
losses = [row["loss"] for row in rows if "loss" in row]
print(f"{log}: loss {losses[0]:.3f} -> {losses[-1]:.3f} in {rows[-1]['step']} steps")
