"""What ``--dry-run --num_devices`` predicts of communication and step time, beside what small runs really do."""
