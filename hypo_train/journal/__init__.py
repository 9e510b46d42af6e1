"""What a run says of itself: numbers, lines, records, and on what it ran."""
