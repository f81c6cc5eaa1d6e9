"""Executor `interpreter`: graphs with their weights as inputs, run by the reference evaluator of the ONNX project."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from safetensors.numpy import load_file

from fluxkiln.compile.executor import Net, check_inputs, find_net


class Interpreter:
    """Runs parts by name; see `fluxkiln.compile.executor.Executor`.

    Args:
        nets: part -> its net, whose file has its weights. graphs: kind -> graph.
    """

    name = "interpreter"

    def __init__(self, nets: Mapping[str, Net], graphs: Mapping[str, Path]) -> None:
        self.nets, self.graphs = nets, graphs
        self.evaluators: dict[str, ReferenceEvaluator] = {}
        self.weights: dict[str, dict[str, NDArray[Any]]] = {}

    def __call__(self, part: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        net = find_net(self.nets, part)
        check_inputs(net, inputs)
        kind = net.kind.name
        if kind not in self.evaluators:
            self.evaluators[kind] = ReferenceEvaluator(str(self.graphs[kind]))
        if part not in self.weights:
            self.weights[part] = load_file(net.file)
        given = {spec.name: inputs[spec.name].astype(spec.dtype) for spec in net.inputs}
        evaluator = self.evaluators[kind]
        return dict(zip(evaluator.output_names, evaluator.run(None, {**given, **self.weights[part]}), strict=True))

    def load(self, component: str) -> None:
        """Weights are read when a part runs."""

    def release(self, component: str) -> None:
        for part in [part for part in self.weights if self.nets[part].component == component]:
            del self.weights[part]

    def drop(self, part: str) -> None:
        self.weights.pop(part, None)

    def close(self) -> None:
        self.weights.clear()

    @property
    def facts(self) -> Mapping[str, str]:
        return {"runtime": f"onnx.reference {onnx.__version__}", "device": "numpy, float32 arithmetic"}
