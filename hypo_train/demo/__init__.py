"""The demo: DPO and HyPO side by side on a small world whose true reward is known."""
