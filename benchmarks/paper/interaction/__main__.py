"""``python -m benchmarks.paper.interaction``: train every method in every world, then write the table and pictures.

``--report_only`` writes them from the recorded numbers. The numbers of a machine are the same bits in every run.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.paper.interaction import pictures
from benchmarks.paper.interaction.experiment import run
from benchmarks.paper.interaction.report import lines

RESULTS = Path(__file__).parent.parent / "results"
# Nothing was run with these seeds before the commit that fixed worlds, sweeps and rules; development used 100 to 103.
PUBLISHED = range(2000, 2016)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper.interaction", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(PUBLISHED), help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each (default: %(default)s)")
    parser.add_argument("--results_dir", type=Path, default=RESULTS, help="for the numbers, the table and the pictures")
    parser.add_argument("--report_only", action="store_true", help="train nothing: report the recorded numbers again")
    options = parser.parse_args(argv)
    if len(set(options.seeds)) < 2:
        parser.error(f"--seeds {' '.join(map(str, options.seeds))}: at least two different ones, for standard errors")
    if options.workers < 1:
        parser.error(f"--workers {options.workers}: at least 1")
    started, path = time.perf_counter(), options.results_dir / "interaction.json"
    if not options.report_only:
        record = run(options.seeds, options.workers)
        options.results_dir.mkdir(parents=True, exist_ok=True)
        path.write_text(_json(record) + "\n", encoding="utf-8")
    record = json.loads(path.read_text(encoding="utf-8"))
    table = "\n".join(lines(record))
    path.with_suffix(".md").write_text(table + "\n", encoding="utf-8")
    pictures.draw(record, options.results_dir)
    print(f"{table}\n\n{path}, in {time.perf_counter() - started:.0f} s")


def _json(record: dict[str, Any]) -> str:
    """Return JSON with a line for each list."""
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
    return text.replace("],", "],\n").replace("]},", "]},\n")


if __name__ == "__main__":
    main()
