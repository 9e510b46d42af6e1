"""What a step costs: seconds by phase, work, rate and memory."""
