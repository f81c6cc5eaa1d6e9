"""Runs inside TPU-MLIR's Python 3.10 environment: `model_transform` on a graph whose weights lie beside it.

The tool loads all weights into the graph, copies the graph once to print it and once more to save it: four times the
weights in memory, 5.5 GB for one double block. Here the graph stays without them, and each weight is mapped from its
file when the tool asks for it. Nothing else changes; the arguments are the tool's own.

Source: TPU-MLIR 1.30.2, python/transform/OnnxConverter.py, load_onnx_model.
"""

import os
import runpy
import sys

import numpy as np
import onnx
from onnx import numpy_helper

_load, _to_array = onnx.load, numpy_helper.to_array
_folder = ""


def load_without_weights(file: str) -> onnx.ModelProto:
    """`onnx.load`, leaving external data where it is."""
    global _folder
    _folder = os.path.dirname(os.path.abspath(file))
    return _load(file, load_external_data=False)


def map_weight(tensor: onnx.TensorProto, base_dir: str = "") -> np.ndarray:
    """`numpy_helper.to_array`, mapping external data instead of reading it into the graph."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return _to_array(tensor, base_dir)
    entries = {entry.key: entry.value for entry in tensor.external_data}
    path = os.path.join(_folder, entries["location"])
    return np.memmap(path, np.float32, "r", int(entries.get("offset", 0)), tuple(tensor.dims))


onnx.load = load_without_weights  # type: ignore[assignment]
numpy_helper.to_array = map_weight
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])  # not our own folder, where another tpu_mlir lies
runpy.run_path(sys.argv[0], run_name="__main__")
