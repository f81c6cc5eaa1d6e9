"""Stands in for torch in compiler processes: the ONNX route of TPU-MLIR 1.30.2 uses `torch.tensor(x).numpy()` only.

On PYTHONPATH of compiler processes and nowhere else. It can go when `transform/OnnxOpt.py` stops importing torch.
"""

from __future__ import annotations

from typing import Any


class _Tensor:
    def __init__(self, values: Any) -> None:
        self._values = values

    def numpy(self) -> Any:
        import numpy as np

        return np.asarray(self._values)


def tensor(values: Any) -> _Tensor:
    """Hold `values` so that `.numpy()` gives them back."""
    return _Tensor(values)


def __getattr__(name: str) -> Any:
    if name.startswith("__"):  # what the import machinery itself asks for
        raise AttributeError(name)
    # Code that probes for torch catches ImportError.
    raise ImportError(f"torch.{name} is not available: compiler processes run without torch")
