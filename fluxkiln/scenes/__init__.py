"""Drawn scenes: a grammar of captions, their pictures, a judge that reads pictures, and the recipe of small models."""
