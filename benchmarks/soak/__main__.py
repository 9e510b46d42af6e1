"""``python -m benchmarks.soak``: kill small runs at random moments, resume them, compare what they end with.

Each run is killed a few times: at moments drawn evenly from all kinds (every phase of a step, every file operation of a
save), or after a random delay. SIGTERM stops it in between. Then it runs to its end. Metrics, samples and final model
must equal those of an uninterrupted run, bit for bit.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path


def _not_negative(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    """Return exit status 1 if any run differs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=_not_negative, default=200, help="number of kills by SIGKILL (default: 200)")
    parser.add_argument("--stops", type=_not_negative, default=40, help="number of stops by SIGTERM (default: 40)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default: 0)")
    parser.add_argument("--keep", type=Path, help="new folder that keeps the runs with differences")
    arguments = parser.parse_args(argv)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=arguments.keep is None)
        # Libraries read these when they are imported. A fork has one thread and would wait for others forever.
        os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        os.environ["HF_DATASETS_CACHE"] = str(folder / "datasets")
        from benchmarks.soak.soak import report, run

        soak = run(arguments, folder)
    print(report(soak))
    print(f"in {time.monotonic() - started:.0f} seconds")
    return 1 if soak.different else 0


if __name__ == "__main__":
    sys.exit(main())
