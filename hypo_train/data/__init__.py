"""Read a data set, tokenize its rows, and plan which rows each optimizer step trains on."""
