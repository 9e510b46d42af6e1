"""What one process of several does; run by ``test_processes.py``, several runs in one start.

``python ranks.py FOLDER`` trains the configurations in ``FOLDER/configs.json``, a process as the environment says.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

from hypo_train.config import Config
from hypo_train.train import train


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    for values in json.loads((folder / "configs.json").read_text(encoding="utf-8")):
        train(Config(**values), progress=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
