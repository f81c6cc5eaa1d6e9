"""Typed artifacts, manifests, content-addressed store."""
