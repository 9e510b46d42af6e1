"""One optimizer step: what is measured, by whom, and how it is told."""
