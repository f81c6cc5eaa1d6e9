"""Checkpoint -> template graphs (ONNX, PT) and weight bindings."""
