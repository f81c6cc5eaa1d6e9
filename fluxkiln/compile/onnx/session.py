"""Running parts with ONNX Runtime on the CPU, float32: linked graphs and fed templates alike."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fluxkiln.compile.onnx.link import external_files
from fluxkiln.compile.onnx.products import quantize_activations, split_products
from fluxkiln.errors import CompileError, IntegrityError

_DTYPES: Mapping[str, Any] = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(int32)": np.int32}
FATAL_ONLY = 4  # what goes wrong is raised, so not printed as well


def run_session(
    session: Any, part: str, inputs: Mapping[str, NDArray[Any]], weights: Mapping[str, NDArray[Any]] | None = None
) -> dict[str, NDArray[Any]]:
    """The outputs of `part` by name, float32.

    Args:
        inputs: by the names and with the shapes of the part's kind, any dtype.
        weights: graph inputs that are no activations; taken as they are, without a copy.

    Raises:
        CompileError: an input is missing, unknown or of another shape, or the run failed.
    """
    given = dict(weights or {})
    specs = {spec.name: spec for spec in session.get_inputs() if spec.name not in given}
    if odd := sorted(specs.keys() ^ inputs.keys()):
        raise CompileError(f"part {part} takes {', '.join(specs)}: {', '.join(odd)} is missing or one too many")
    for name, spec in specs.items():
        if list(inputs[name].shape) != list(spec.shape):
            raise CompileError(
                f"part {part}: input {name} has shape {list(inputs[name].shape)}, the graph was exported for "
                f"{list(spec.shape)}; use the size and token count of the build"
            )
        given[name] = np.ascontiguousarray(inputs[name], _DTYPES[spec.type])
    names = [spec.name for spec in session.get_outputs()]
    try:
        results = session.run(names, given)
    except _failures() as error:
        raise CompileError(f"ONNX Runtime could not run part {part}: {error}") from error
    return dict(zip(names, results, strict=True))


def open_session(graph: Path, *, threads: int = 0, spin: bool = True, fast: bool = False) -> Any:
    """An `onnxruntime.InferenceSession` of the file `graph` on the CPU; arguments as `make_session`.

    Products with large 16-bit weights are done in ranges of rows (see `split_products`).

    Args:
        fast: products with packed weights round their activations to 8 bits (see `quantize_activations`).

    Raises:
        IntegrityError: a file with weights is missing or too short.
        CompileError: ONNX Runtime refuses the graph.
    """
    try:
        rewritten = _rewritten(graph, fast)
        return make_session(rewritten or graph, str(graph), threads=threads, spin=spin, weights=graph.parent)
    except CompileError:
        check_files(graph)
        raise


def make_session(
    graph: Path | bytes, what: str, *, threads: int = 0, spin: bool = True, weights: Path | None = None
) -> Any:
    """An `onnxruntime.InferenceSession` of a graph on the CPU.

    Args:
        graph: a file, or a serialized model.
        what: what to call the graph in an error.
        spin: threads that wait for work keep their core busy for a while. Each session has its own, so with many
            sessions in turn they take it from the one that works.
        weights: the folder that the files with a serialized model's weights are named from.

    Raises:
        CompileError: ONNX Runtime refuses the graph.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = FATAL_ONLY
    if not spin:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if weights is not None and isinstance(graph, bytes):
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
    # in the order of the file, where a weight is cast right before its use: one cast weight in memory at a time;
    # fusions would undo that order and save no time
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    # memory goes back to the system as soon as it is free: a block of FLUX.1's width takes 0.4 GB less, and 8 to 18 %
    # longer
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    try:
        # folding would make a float32 copy of every cast weight
        return onnxruntime.InferenceSession(
            graph, options, providers=["CPUExecutionProvider"], disabled_optimizers=["ConstantFolding"]
        )
    except _failures() as error:
        raise CompileError(f"ONNX Runtime refuses {what}: {error}") from error


def _rewritten(graph: Path, fast: bool) -> bytes | None:
    """The model with its large products split and, if `fast`, its packed ones in integers; None without either."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(graph, load_external_data=False)
    except (OSError, DecodeError):
        return None  # ONNX Runtime says what is wrong with it
    if not split_products(model) + (quantize_activations(model) if fast else 0):
        return None
    serialized: bytes = model.SerializeToString(deterministic=True)
    return serialized


def check_files(graph: Path) -> None:
    """Raise IntegrityError unless a graph is there, and the files that it reads are as long as it takes."""
    if not graph.is_file():
        raise IntegrityError(f"{graph} does not exist; build it again")
    for file, needed in external_files(graph).items():
        size = file.stat().st_size if file.is_file() else -1
        if size < needed:
            found = "does not exist" if size < 0 else f"has {size} bytes"
            raise IntegrityError(f"{file} {found}, {graph.name} reads {needed} bytes of it; fetch or build it again")


def _failures() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises; its exceptions have no base of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return (
        state.Fail, state.InvalidArgument, state.InvalidGraph, state.InvalidProtobuf, state.NoSuchFile,
        state.NotImplemented, state.RuntimeException,
    )  # fmt: skip
