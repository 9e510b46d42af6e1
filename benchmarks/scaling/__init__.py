"""Compare the communication and step time that ``--dry-run --num_devices`` predicts with those of small runs."""
