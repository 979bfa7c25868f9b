"""What `make demo` takes and gives, on two cores.

    python benchmarks/digits.py

Runs the demo's own command, samples the memory of its process tree every 0.1 s, and writes
benchmarks/results/digits.json.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path

from record import python, run_measured, takes_no_arguments, write


def main() -> None:
    """Run the demo, record it."""
    takes_no_arguments(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        seconds, peak = run_measured(python("tools/demo.py", f"run_dir={run_dir}"))
        rows = json.loads((run_dir / "evaluation.json").read_text())["rows"]
        metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    rates = [row["images_per_second"] for row in metrics if "images_per_second" in row]
    results = {
        "seconds": round(seconds, 1),
        "peak_pss_gib": round(peak, 2),
        "images_per_second_median": statistics.median(rates),
        "steps": metrics[-1]["step"],
        "rows": rows,
    }
    write("digits", "python benchmarks/digits.py", results)


if __name__ == "__main__":
    main()
