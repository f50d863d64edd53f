"""Speed of the second half of a training, from its log.   python -m benchmarks.updates RUN BATCH NAME

Prints one line, and adds it to updates.json beside the run's folder. The first half is ignored, because it includes
compiling.
"""

import json
import sys
from pathlib import Path

from benchmarks.record import machine

GOAL = 200_000
"""Optimizer steps of the authors' CIFAR-10 notebook."""


def main(run: str, batch: str, name: str) -> None:
    """Measure a run with this batch size, as the row `name`."""
    lines = (Path(run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    # The log's rate is an average since the start of the process, so images / rate is the time since then.
    seen = [
        (row["step"], row["step"] * int(batch) / row["train/images_per_second"])
        for row in map(json.loads, lines)
        if "train/images_per_second" in row
    ]
    (first, began), (last, ended) = seen[(len(seen) - 1) // 2], seen[-1]
    seconds = (ended - began) / (last - first)
    row = {
        "way": name,
        "batch": int(batch),
        "ms_per_update": seconds * 1e3,
        "images_per_s": int(batch) / seconds,
        "minutes_for_200000": GOAL * seconds / 60,
        "began_after_s": seen[0][1],
    }
    print(
        f"{name}: {row['ms_per_update']:.2f} ms an update of {batch}, {row['images_per_s']:,.0f} images/s; "
        f"{GOAL:,} updates would take {row['minutes_for_200000']:.1f} minutes"
    )
    path = Path(run).parent / "updates.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    path.write_text(json.dumps({"machine": machine(), "rows": [*rows, row]}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
