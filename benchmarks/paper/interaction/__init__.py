"""When does an online KL beat DPO? Coverage × method, in contextual bandits."""
