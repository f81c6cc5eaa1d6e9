"""Figures that the docs quote, each measured by one module of this package: `python -m bench --list`."""
