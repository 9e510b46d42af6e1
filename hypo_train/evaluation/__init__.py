"""Evaluation on held-out rows: during training, of a finished run, or of any model."""
