"""Runs inside TPU-MLIR's Python 3.10 environment: bmodels on the simulator, lowered graphs in the interpreter.

One JSON request a line on stdin, one JSON answer a line on the stream that was stdout (the libraries print on stdout
themselves, so their prints are sent to stderr). Requests:
    {"file": path, "net": name or "", "inputs": npz, "outputs": npz, "values": names}
A `.bmodel` runs on the chip's simulator, a `.mlir` in the compiler's interpreter. `values` asks for values of a lowered
graph in place of its outputs. Answers: {"ok": true} or {"ok": false, "error": text}.
Inputs are float32 or integers; outputs are written as float32.
"""

import json
import os
import re
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]

_models: dict[str, Any] = {}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            inputs = dict(np.load(request["inputs"]))
            binary = request["file"].endswith(".bmodel")
            run, what = (run_bmodel, request["net"]) if binary else (run_lowered, request["values"])
            outputs: dict[str, Any] = run(request["file"], what, inputs)
            np.savez(request["outputs"], **outputs)
            answer: dict[str, Any] = {"ok": True}
        except Exception as error:  # whatever the libraries raise belongs into the answer
            answer = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def run_bmodel(file: str, name: str, inputs: Arrays) -> Arrays:
    import pyruntime_bm

    if file not in _models:
        _models.clear()  # the simulated device memory is one chip's
        _models[file] = pyruntime_bm.Model(file, 0, "")
    model = _models[file]
    if name and name not in model.networks:
        raise KeyError(f"no net {name!r}, there are {', '.join(model.networks)}")
    net = model.Net(name or model.networks[0])
    for tensor in net.inputs:
        data = inputs[tensor.name]
        if tuple(tensor.data.shape) != data.shape:
            raise ValueError(f"input {tensor.name} has shape {data.shape}, not {tensor.data.shape}")
        tensor.data[:] = narrow(data, tensor.dtype)
    net.forward()
    return {tensor.name: _widen(tensor.data, tensor.dtype) for tensor in net.outputs}


def run_lowered(file: str, values: list[str], inputs: Arrays) -> Arrays:
    import pymlir

    pymlir.set_mem_mode("reused_mem" if inputs_first(file) and not values else "value_mem")
    module = pymlir.module()
    folder = os.getcwd()
    os.chdir(os.path.dirname(file))  # the graph names its weight file without a folder
    try:
        module.load(file)
    finally:
        os.chdir(folder)
    for tensor in module.input_names:
        given = inputs.pop(tensor).astype(np.float32, copy=False)
        module.set_tensor(tensor, given, given.shape)
        del given  # the module has a copy
    module.invoke(True)
    return {tensor: np.array(module.get_tensor(tensor), np.float32) for tensor in values or module.output_names}


def inputs_first(file: str) -> bool:
    """Whether a lowered graph declares its inputs before all else (`fluxkiln.compile.toolchains.tpu_mlir.graphs`).

    Only then may activations be put in one another's place: an input would be in that of another.
    """
    with open(file) as lines:
        names = re.findall(r' = "([\w.]+)"\(', lines.read())
    return "top.Input" not in names[names.count("top.Input") :]


def narrow(data: NDArray[Any], dtype: str) -> NDArray[Any]:
    if dtype == "bf16":  # to nearest, ties to even
        bits = np.ascontiguousarray(data, np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    if dtype == "f16":
        return data.astype(np.float16)
    return data.astype({"f32": np.float32, "i32": np.int32, "si32": np.int32, "ui32": np.uint32}[dtype])


def _widen(data: NDArray[Any], dtype: str) -> NDArray[Any]:
    if dtype == "bf16":
        return (np.array(data).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.array(data).astype(np.float32)


if __name__ == "__main__":
    main()
