"""Pairwise judges, which say which of two responses to a prompt is better, and the win-rate of their verdicts."""
