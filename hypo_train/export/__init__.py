"""``python -m hypo_train export``: a run's weights as a folder that transformers, peft and vLLM load."""
