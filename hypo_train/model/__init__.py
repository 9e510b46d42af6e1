"""Models: loading and checking them, the policy and its reference, reward models."""
