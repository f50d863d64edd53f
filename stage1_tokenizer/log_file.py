"""A run's logs, metrics.jsonl and alarms.jsonl: one JSON object per line, with the `step` it belongs to."""

import json
from pathlib import Path
from typing import Any


def log_entries(log: Path) -> list[dict[str, Any]]:
    """The entries of a log, in order; none where there is no file. Lines that are none, as a kill leaves them, or as
    they look while another process writes them, are left out."""
    if not log.is_file():
        return []
    entries = []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
            if isinstance(entry["step"], int):
                entries.append(entry)
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return entries
