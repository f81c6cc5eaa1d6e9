"""Synthetic checkpoints: the folder layout of a model with random weights."""
