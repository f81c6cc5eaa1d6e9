"""ONNX Runtime, on any CPU: graphs whose weights stay where they are."""
