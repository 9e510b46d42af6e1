"""Measure one optimizer step, this project's beside TRL's."""
