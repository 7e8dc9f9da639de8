"""What a run leaves to read: rows, statistics, curves."""
