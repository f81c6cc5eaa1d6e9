"""Runs inside TPU-MLIR's Python 3.10 environment: `model_transform` on a graph whose weights lie beside it.

The tool loads all weights into the graph, copies the graph once to print it and once more to save it: four times the
weights in memory, 5.5 GB for one double block. Here the graph stays without them, each weight is mapped from its file
when the tool asks for it, and is let go when the tool has written it down. The tool also learns to read tanh GELU as
one node (`fluxkiln.compile.toolchains.tpu_mlir.gelu`). Nothing else changes; the arguments are the tool's own.

Source: TPU-MLIR 1.30.2, python/transform/OnnxConverter.py, load_onnx_model and convert_gelu_op; BaseConverter.py,
WeightToNpz.
"""

import os
import runpy
import sys
import zipfile
from typing import Any

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


class Mapped(np.memmap):
    """A mapped array whose conversion to its own type is no copy."""

    def astype(self, dtype: Any, *arguments: Any, **settings: Any) -> Any:
        return self if self.dtype == dtype else super().astype(dtype, *arguments, **settings)


def map_weight(tensor: onnx.TensorProto, base_dir: str = "") -> np.ndarray:
    """`numpy_helper.to_array`, mapping external data instead of reading it into the graph."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return _to_array(tensor, base_dir)
    entries = {entry.key: entry.value for entry in tensor.external_data}
    path = os.path.join(_folder, entries["location"])
    return Mapped(path, np.float32, "r", int(entries.get("offset", 0)), tuple(tensor.dims))


def write_weights(converter: Any, file: str) -> None:
    """`np.savez` of all weights that the graph uses, each let go once it is written."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name in list(converter.tensors):
            weight = converter.tensors.pop(name)
            if name in converter.operands:
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, weight, allow_pickle=False)


def read_gelu(converter: Any, node: Any) -> None:
    """Convert ONNX Runtime's tanh GELU; the tool knows only the erf GELU that it fuses itself."""
    from mlir.dialects import top
    from mlir.ir import StringAttr

    place = {"loc": converter.get_loc(f"{node.name}_{node.op_type}"), "ip": converter.mlir.insert_point}
    mode = StringAttr.get("tanh", converter.mlir.ctx)
    made = top.GELUOp(converter.unranked_type, converter.getOperand(node.inputs[0]), approx_mode=mode, **place)
    converter.addOperand(node.name, made.output)


def teach_gelu(converter_class: Any) -> None:
    """Add `read_gelu` to what every converter made from now on knows."""
    init = converter_class.__init__

    def init_with_gelu(self: Any, *arguments: Any, **settings: Any) -> None:
        init(self, *arguments, **settings)
        self.onnxop_factory["FastGelu"] = lambda node: read_gelu(self, node)

    converter_class.__init__ = init_with_gelu


onnx.load = load_without_weights  # type: ignore[assignment]
numpy_helper.to_array = map_weight
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])  # not our own folder, where another tpu_mlir lies

from transform.OnnxConverter import OnnxConverter  # type: ignore[import-not-found]  # noqa: E402  # the tool's own

teach_gelu(OnnxConverter)
OnnxConverter.WeightToNpz = write_weights
runpy.run_path(sys.argv[0], run_name="__main__")
