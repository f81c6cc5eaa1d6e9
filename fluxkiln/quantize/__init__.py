"""Weights -> 4-bit codes and scales; schemes as data."""
