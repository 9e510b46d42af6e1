"""Soak: small runs of every kind, killed and stopped anywhere, must end as if nobody had touched them."""
