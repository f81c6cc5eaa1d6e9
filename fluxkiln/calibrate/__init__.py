"""4-bit schemes against a checkpoint: statistics of its inputs, methods compared, choices within a budget."""
