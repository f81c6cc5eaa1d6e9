"""Reversible, version-checked rewrites of diffusers and transformers modules."""
