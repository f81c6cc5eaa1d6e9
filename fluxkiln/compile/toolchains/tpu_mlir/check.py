"""Self-check of a TPU-MLIR environment, run by its Python 3.10: compile one matmul and run it on the simulator.

Usage: `python tpu_mlir_check.py CHIP RESULT.json -- TRANSFORM... -- DEPLOY...` in an empty working directory, where
the two command lines start `model_transform` and `model_deploy`. Writes {"rel_l2": ..., "max_abs": ...} last.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ROWS, INNER, COLUMNS = 8, 64, 32


def write_model(path: Path) -> dict[str, Any]:
    """Write `y = x @ w + b` as ONNX; return x, w and b."""
    rng = np.random.default_rng(1684)
    w, b, x = (rng.standard_normal(s, dtype=np.float32) for s in ((INNER, COLUMNS), (COLUMNS,), (ROWS, INNER)))
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["product"]), helper.make_node("Add", ["product", "b"], ["y"])],
        "check",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [ROWS, INNER])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [ROWS, COLUMNS])],
        [numpy_helper.from_array(w, "w"), numpy_helper.from_array(b, "b")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return {"x": x, "w": w, "b": b}


def simulate(bmodel: str, x: Any) -> Any:
    """Run the first net of `bmodel` on the simulator."""
    import pyruntime_bm

    model = pyruntime_bm.Model(bmodel, 0, "")
    net = model.Net(model.networks[0])
    net.inputs[0].data[:] = x.reshape(net.inputs[0].data.shape)
    net.forward()
    return np.array(net.outputs[0].data, dtype=np.float64)


def main(argv: list[str]) -> None:
    chip, result, rest = argv[0], Path(argv[1]), argv[3:]
    cut = rest.index("--")
    transform, deploy = rest[:cut], rest[cut + 1 :]
    tensors = write_model(Path("check.onnx"))
    shapes = f"[[{ROWS},{INNER}]]"
    model = ["--model_name", "check", "--model_def", "check.onnx", "--input_shapes", shapes]
    subprocess.run([*transform, *model, "--mlir", "check.mlir"], check=True)
    target = ["--quantize", "F32", "--chip", chip, "--model", "check.bmodel"]
    subprocess.run([*deploy, "--mlir", "check.mlir", *target], check=True)
    wanted = tensors["x"].astype(np.float64) @ tensors["w"] + tensors["b"]
    error = simulate("check.bmodel", tensors["x"]).reshape(wanted.shape) - wanted
    numbers = {
        "rel_l2": float(np.linalg.norm(error) / np.linalg.norm(wanted)),
        "max_abs": float(np.abs(error).max()),
    }
    result.write_text(json.dumps(numbers), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # taking the simulator down in good order takes a second and changes nothing
