"""summary.json: what a run did, its main numbers and how it ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dvpo_ray.files import whole_file
from dvpo_ray.monitoring.run_files import finite


def write_summary(run_folder: str | Path, summary: dict[str, Any]) -> Path:
    """Write summary.json, replacing an older one as a whole.

    Numbers that are not finite become null. A run with a gold judge has `gold.before.mean`, `gold.after.mean`,
    `gold.gain_ci95`, `gvm.heldout_accuracy`, `duration_seconds` and `peak_memory_gib`.

    Returns:
        The path of the file.
    """
    path = Path(run_folder) / "summary.json"
    text = json.dumps(finite(summary), indent=2)
    with whole_file(path) as file:
        file.write(text + "\n")
    return path
