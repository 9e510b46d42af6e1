"""Pairwise judges, which choose the better of two responses to a prompt, and the win-rate of their verdicts."""
