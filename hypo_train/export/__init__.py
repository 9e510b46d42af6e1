"""``python -m hypo_train export``: what a run trained, as a folder that transformers, peft and vLLM load."""
