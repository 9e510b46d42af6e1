"""Prompts and their completions as packed rows, and attention over them."""
