"""Template + weights -> bmodel or ONNX Runtime files; one file per target, one adapter per toolchain."""
