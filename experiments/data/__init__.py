"""Data sets, label noise and batches."""
