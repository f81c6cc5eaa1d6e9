"""ONNX graphs: filled with weights, linked to files, run by ONNX Runtime, looked into."""
