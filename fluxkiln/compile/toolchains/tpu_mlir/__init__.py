"""TPU-MLIR, for Sophgo chips: moulds, casts, proofs, the simulator."""
