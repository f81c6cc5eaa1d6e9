"""Stands in for onnxruntime_extensions, which imports transformers and torch for tokenizers.

`transform/OnnxOpt.py` declares three custom operators of other models with it when it is imported; declaring is all
that this allows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class PyOp:
    """Type codes that operator declarations name."""

    dt_float = 1
    dt_int64 = 7


class PyOrtFunction:
    """Runs graphs with custom operators; no graph of ours has one."""

    @staticmethod
    def from_model(*_: Any) -> Any:
        raise ImportError("onnxruntime_extensions is not installed: graphs with custom operators are not supported")


def onnx_op(**_: Any) -> Callable[[Any], Any]:
    """Accept the declaration of a custom operator and leave the function as it is."""
    return lambda function: function
