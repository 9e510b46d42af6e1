"""``python -m hypo_train``: the demo without arguments, a subcommand by its name, any other run by configuration."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence

from hypo_train.config import Config, help_text, is_users_mistake, load_config
from hypo_train.distributed.torchrun import record_for_torchrun, wait_for_torchrun
from hypo_train.invocation import DryRun, take_dry_run
from hypo_train.utils.errors import NotFiniteError, OtherProcessError, Stopped
from hypo_train.utils.safe_print import safe_print


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0; 2 with one line for every mistake in the configuration, the data or the model; 1 after a loss that
    is not finite, 128 and a signal's number after a signal has stopped a run."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = argv[0] if argv else "demo"
    if command not in _COMMANDS and {"-h", "--help"} & set(argv):
        print(help_text())
        return 0
    try:
        if command in _COMMANDS:
            return _COMMANDS[command](argv[1:])
        dry_run, argv = take_dry_run(argv)
        config = load_config(argv)
        if dry_run is not None:
            return _dry_run(config, dry_run)
        from hypo_train.train import train

        _quiet_libraries()
        result = record_for_torchrun(train)(config)
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
        safe_print("hypo_train: stopped by SIGINT where it was; what was saved before is kept", sys.stderr)
        return 128 + signal.SIGINT
    if os.environ.get("RANK", "0") == "0":
        safe_print(f"model saved in {result.model_dir}")
    return 0


def _dry_run(config: Config, dry_run: DryRun) -> int:
    """Exit status 2, and a line for every mistake, where the run would be refused; the page of what was found."""
    from hypo_train.preflight import check

    _quiet_libraries()
    warnings.simplefilter("ignore", FutureWarning)  # of transformers, about its own next release
    found = check(config, dry_run)
    for problem in found.problems:
        print(f"hypo_train: {problem}", file=sys.stderr)
    sys.stderr.flush()
    print("\n".join(["dry run: nothing was trained or written, and no weights were read", "", *found.page()]))
    return 2 if found.problems else 0


def _demo(argv: Sequence[str]) -> int:
    from hypo_train.demo.settings import load_settings

    settings = load_settings(argv)
    from hypo_train.demo.run import run

    _quiet_libraries()
    return run(settings)


def _evaluate(argv: Sequence[str]) -> int:
    from hypo_train.evaluation.settings import load_settings

    settings = load_settings(argv)
    from hypo_train.evaluation.command import run

    _quiet_libraries()
    return run(settings)


def _judge(argv: Sequence[str]) -> int:
    from hypo_train.judges.settings import load_settings

    settings = load_settings(argv)
    from hypo_train.judges.command import run

    if settings.reward_model is not None:
        _quiet_libraries()
    return run(settings)


def _export(argv: Sequence[str]) -> int:
    from hypo_train.export.settings import load_settings

    settings = load_settings(argv)
    from hypo_train.export.command import run

    _quiet_libraries()
    return run(settings)


def _report(argv: Sequence[str]) -> int:
    from hypo_train.report.command import main as report

    return report(argv)


# Each checks its arguments before it imports anything heavy.
_COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "demo": _demo,
    "evaluate": _evaluate,
    "export": _export,
    "judge": _judge,
    "report": _report,
}


def _quiet_libraries() -> None:
    """What goes wrong is raised and shown as one line; without a terminal, the libraries' bars only break lines."""
    import datasets
    from transformers.utils import logging

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs what it raises as well
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
