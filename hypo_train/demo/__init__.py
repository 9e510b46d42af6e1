"""The demo: DPO and HyPO side by side on a small world whose true reward is known."""

from hypo_train.demo.run import main

__all__ = ["main"]
