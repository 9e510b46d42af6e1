"""Soak test: small runs of every kind, killed and stopped at random moments, must equal uninterrupted ones."""
