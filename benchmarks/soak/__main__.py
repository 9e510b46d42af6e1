"""``python -m benchmarks.soak``: kill small runs at random moments, resume them, compare what they end with.

Each run is killed a few times on its way, at moments drawn evenly over the kinds of moments that it has (every phase
of a step, every operation of a save), some after a random delay, and stopped by SIGTERM in between; then it is left
alone until it ends. Metrics, samples and final model must be those of the run that nobody touched, bit for bit.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path


def _positive(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 where anything differs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=_positive, default=200, help="deaths by SIGKILL (default: 200)")
    parser.add_argument("--stops", type=_positive, default=40, help="stops by SIGTERM (default: 40)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--keep", type=Path, help="folder that keeps runs with differences; made anew")
    arguments = parser.parse_args(argv)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=arguments.keep is None)
        # Read when libraries are imported. A fork has one thread: more would wait for those that it has not.
        os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        os.environ["HF_DATASETS_CACHE"] = str(folder / "datasets")
        from benchmarks.soak.soak import report, run

        soak = run(arguments, folder)
    print(report(soak))
    print(f"in {time.monotonic() - started:.0f} seconds")
    return 1 if soak.different else 0


if __name__ == "__main__":
    sys.exit(main())
