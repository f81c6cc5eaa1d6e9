"""From a kind and shapes to a template: the graph with its weights as named inputs and no weight data in it.

The module lives on the meta device and its parameters are handed in as traced arguments, so that tracing costs neither
memory nor arithmetic, at any size, for every format.
"""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.errors import ExportError, UsageError
from fluxkiln.patches.model import Model
from fluxkiln.patches.parts import slot_name
from fluxkiln.patches.patch import apply_patches, patches_for
from fluxkiln.types import Configs, GraphFormat, Kind, Shapes, Template, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

OPSETS: Mapping[str, int] = {"onnx17": 17, "onnx23": 23}
# convolutions cost arithmetic on the CPU, so a VAE is traced on this side of latents and its shape is set afterwards
TRACED_LATENT = 8
SUFFIXES: Mapping[str, str] = {"onnx17": ".onnx", "onnx23": ".onnx", "pt2": ".pt2", "torchscript": ".pt"}


def export_template(
    model: Model, kind: str, configs: Configs, shapes: Shapes, graph_format: GraphFormat, destination: Path
) -> Template:
    """Trace `kind` and write its graph to `destination` (a folder).

    Raises:
        UsageError: no such kind or format. PatchError: upstream changed. ExportError: the graph is not what it must be.
    """
    import torch

    if graph_format not in SUFFIXES:
        raise UsageError(f"no graph format is called {graph_format!r}; there are {', '.join(SUFFIXES)}")
    inputs, traits = model.part_inputs(kind, configs, shapes), model.kinds[kind]
    path = destination / f"{kind}{SUFFIXES[graph_format]}"
    with apply_patches(patches_for(model.patches(), kind, graph_format)):
        module = _slots_as_inputs(model.build_part(kind, configs), len(inputs))
        arguments = _arguments("meta", inputs, module)
        outputs = _output_specs(traits, module, arguments)
        scripted = graph_format in ("onnx17", "torchscript")
        # torch.export computes nothing either way, but what it traced on the meta device runs nowhere else; constants
        # made there have no value; torch's meta convolution does not take the TorchScript tracer's shapes
        if traits.traced_on == "cpu" or graph_format == "pt2" or (traits.convolutional and scripted):
            arguments = _arguments("cpu", inputs, module)
        slots = module.slots
        with _quiet():
            if graph_format in OPSETS:
                opset = OPSETS[graph_format]
                slots = _write_onnx(module, arguments, inputs, outputs, path, opset, traits.convolutional)
            elif graph_format == "pt2":
                torch.export.save(torch.export.export(module, arguments, strict=False), path)
            else:
                _write_torchscript(module, arguments, path)
    digest = "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
    return Template(kind, graph_format, path, digest, inputs, outputs, slots)


def _slots_as_inputs(module: Module, activations: int) -> Any:
    """A module that takes the part's activations and then all its weights as arguments."""
    import torch

    parameters = dict(module.named_parameters())

    class SlotsAsInputs(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.__dict__["part"] = module  # not registered: its parameters are arguments now
            self.parameters_in_order = tuple(parameters.values())
            self.slots = tuple(
                TensorSpec(slot_name(name), tuple(parameter.shape)) for name, parameter in parameters.items()
            )

        def forward(self, *arguments: Tensor) -> Any:
            part = self.__dict__["part"]
            places = []
            for name, weight in zip(parameters, arguments[activations:], strict=True):
                owner, _, leaf = name.rpartition(".")
                place = part.get_submodule(owner)._parameters
                places.append((place, leaf, place[leaf]))
                place[leaf] = weight
            try:
                return part(*arguments[:activations])
            finally:
                for place, leaf, parameter in places:
                    place[leaf] = parameter

    return SlotsAsInputs().eval()


def _arguments(device: str, inputs: tuple[TensorSpec, ...], module: Any) -> tuple[Tensor, ...]:
    import torch

    activations = [torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype), device=device) for spec in inputs]
    # one element seen as a whole matrix: no memory on the CPU either
    weights = [torch.ones(1, device=device).expand(spec.shape) for spec in module.slots]
    return (*activations, *weights)


def _output_specs(kind: Kind, module: Any, arguments: tuple[Tensor, ...]) -> tuple[TensorSpec, ...]:
    results = module(*arguments)
    results = results if isinstance(results, tuple) else (results,)
    names = kind.outputs
    if len(results) != len(names):
        raise ExportError(
            f"kind {kind.name} gave {len(results)} outputs, {len(names)} are declared: {', '.join(names)}"
        )
    return tuple(TensorSpec(name, tuple(result.shape)) for name, result in zip(names, results, strict=True))


def _write_onnx(
    module: Any,
    arguments: tuple[Tensor, ...],
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    path: Path,
    opset: int,
    convolutional: bool,
) -> tuple[TensorSpec, ...]:
    """Write the graph, opset 17 by the TorchScript exporter, 23 by the one on torch.export; returns its slots."""
    import onnx_ir as ir
    import torch

    from fluxkiln.export.graph import check_template, finish_graph, fold_constants, set_static_shapes

    options: dict[str, Any] = {
        "opset_version": opset,
        "input_names": [spec.name for spec in (*inputs, *module.slots)],
        "output_names": [spec.name for spec in outputs],
    }
    if opset == OPSETS["onnx17"]:
        if convolutional:
            arguments = (arguments[0][:, :, :TRACED_LATENT, :TRACED_LATENT], *arguments[1:])
            sides = {spec.name: {2: f"{spec.name}_height", 3: f"{spec.name}_width"} for spec in (inputs[0], *outputs)}
            options["dynamic_axes"] = sides
        torch.onnx.export(module, arguments, str(path), dynamo=False, **options)
        model = ir.load(path)
        if convolutional:
            set_static_shapes(model, inputs, outputs)
        slots = finish_graph(model, inputs, outputs)
    else:
        program = torch.onnx.export(module, arguments, dynamo=True, optimize=False, verbose=False, **options)
        if program is None:
            raise ExportError("torch.onnx.export returned no program")
        model, slots = program.model, module.slots
        fold_constants(model)
    check_template(model, opset, inputs, slots, outputs)
    ir.save(model, path)
    return slots


def _write_torchscript(module: Any, arguments: tuple[Tensor, ...], path: Path) -> None:
    import torch

    trace: Any = torch.jit.trace
    traced = trace(module, arguments, check_trace=False)
    if 'device("meta")' in traced.code:
        raise ExportError(
            "the traced graph creates tensors on the meta device, so TorchScript cannot hold it; use the pt2 format"
        )
    torch.jit.save(traced, str(path))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Tracing warns of every Python branch on a static shape; the parity ladder is what judges the graph."""
    import logging

    import torch

    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
