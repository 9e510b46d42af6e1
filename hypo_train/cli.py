"""The command line: the demo without arguments, a subcommand if one is named, else training.

Each command checks its arguments before it imports anything heavy.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from hypo_train.config import Config, load_config
from hypo_train.distributed.torchrun import record_for_torchrun, wait_for_torchrun
from hypo_train.dry_run import DryRun, DryRunFlags, take_dry_run
from hypo_train.utils.errors import NotFiniteError, OtherProcessError, Stopped, is_users_mistake
from hypo_train.utils.flags import flag_lines
from hypo_train.utils.safe_print import safe_print

# Command -> folder. Its settings module reads the arguments and imports nothing heavy; its command module runs.
COMMANDS = {
    "demo": "hypo_train.demo",
    "evaluate": "hypo_train.evaluation",
    "export": "hypo_train.export",
    "judge": "hypo_train.judges",
    "report": "hypo_train.report",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that ``argv`` names and return the exit status.

    The status is 0 on success, 1 after a loss that is not finite or a failure of another process, 2 after mistakes in
    the arguments, the data or the model (one line for each), and 128 + signal number after a signal.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if not argv or argv[0] in COMMANDS:
            return _run_command(COMMANDS[argv[0] if argv else "demo"], argv[1:])
        return _train(argv)
    except ValueError as error:
        if not is_users_mistake(error):
            raise
        print(f"hypo_train: {error}", file=sys.stderr)
        return 2
    except NotFiniteError as error:
        safe_print(f"hypo_train: {error}", sys.stderr)
        return 1
    except OtherProcessError as error:
        safe_print(f"hypo_train: another process has failed: {error}", sys.stderr)
        wait_for_torchrun()
        return 1
    except Stopped as stopped:
        safe_print(f"hypo_train: {stopped}", sys.stderr)
        return 128 + stopped.signal
    except KeyboardInterrupt:
        safe_print("hypo_train: stopped at once by SIGINT; everything that was saved before is unchanged", sys.stderr)
        return 128 + signal.SIGINT


def _run_command(folder: str, argv: Sequence[str]) -> int:
    settings_module: Any = import_module(f"{folder}.settings")
    if _asks_for_help(argv):
        safe_print(settings_module.help_text())
        return 0
    settings = settings_module.load_settings(argv)
    run: Callable[[Any], int] = import_module(f"{folder}.command").run
    return run(settings)


def _train(argv: Sequence[str]) -> int:
    if _asks_for_help(argv):
        safe_print(help_text())
        return 0
    dry_run, argv = take_dry_run(argv)
    config = load_config(argv)
    if dry_run is not None:
        return _dry_run(config, dry_run)
    from hypo_train.train import train
    from hypo_train.utils.quiet import quiet_libraries

    quiet_libraries()
    result = record_for_torchrun(train)(config)
    if os.environ.get("RANK", "0") == "0":
        safe_print(f"model saved in {result.model_dir}")
    if result.hub_url is not None:
        safe_print(f"model uploaded to {result.hub_url}")
    return 0


def _dry_run(config: Config, dry_run: DryRun) -> int:
    """Print the findings of the dry run; return 2 if the run would be refused, else 0."""
    from hypo_train.preflight import check
    from hypo_train.utils.quiet import quiet_libraries

    quiet_libraries()
    warnings.simplefilter("ignore", FutureWarning)  # transformers warns about its next release
    findings = check(config, dry_run)
    for problem in findings.problems:
        print(f"hypo_train: {problem}", file=sys.stderr)
    sys.stderr.flush()
    print("\n".join(["dry run: nothing was trained or written, and no weights were read", "", *findings.page()]))
    return 2 if findings.problems else 0


def _asks_for_help(argv: Sequence[str]) -> bool:
    return not {"-h", "--help"}.isdisjoint(argv)


_USAGE = """\
usage: python -m hypo_train                      the demo
       python -m hypo_train demo --help          the demo's options
       python -m hypo_train --config recipe.yaml --learning_rate 1e-6
       python -m hypo_train evaluate --help      evaluation of a finished run, or of any model
       python -m hypo_train export --help        a run's trained weights, for other tools
       python -m hypo_train judge --help         win-rates of samples
       python -m hypo_train report RUN [RUN ...] one HTML page about runs, side by side

--config reads a flat YAML file of the fields below; --field value, --field=value or, for yes/no
fields, --field alone overrides it. A line base: other.yaml, relative to the file, takes every
field that the file leaves out from another one.

  --resume [FOLDER]
        Resume from that checkpoint, or from the newest complete one in output_dir.
"""


def help_text() -> str:
    """Return the ``--help`` page of training: usage, then every field with its type, default and meaning."""
    dry_run = [line.replace("--dry_run  ", "--dry-run  ") for line in flag_lines(DryRunFlags)]
    return "\n".join([_USAGE.rstrip(), *dry_run, *flag_lines(Config)])
