"""Rows of a data set → token ids → which of them a step trains on."""
