"""Toolchains, a folder each. Nothing outside of a folder knows its name."""
