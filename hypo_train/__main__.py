"""``python -m hypo_train``: the demo without arguments, any other run by configuration."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hypo_train.config import ConfigError, help_text, load_config


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 with one line for every mistake in the configuration, the data or the model."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in ("-h", "--help"):
        print(help_text())
        return 0
    try:
        if not argv or argv[0] == "demo":
            from hypo_train.demo import main as demo

            return demo(argv[1:])
        config = load_config(argv)
        from hypo_train.train import train

        result = train(config)
    except ValueError as error:
        # Bad settings, data and models raise ValueErrors that say what is wrong and how to mend it.
        if not isinstance(error, ConfigError) and type(error).__module__.split(".")[0] != "hypo_train":
            raise
        print(f"hypo_train: {error}", file=sys.stderr)
        return 2
    print(f"model saved in {result.model_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
