"""The parts of a step that are timed, in the order that they come in."""

PHASES = ("data", "sample", "reward", "reference", "forward", "loss", "backward", "optimizer")
OTHER = "other"  # what no phase covers
