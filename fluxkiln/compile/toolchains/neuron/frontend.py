"""From a torch module on the meta device to an HLO module proto of one rank, its weights parameters of it.

torch -> torchax -> `jax.shard_map` -> StableHLO -> HLO. What is private API of jax, jaxlib and torchax is used here
and in `replica_worker`, which is why they take one version of each. Another frontend would have the same
`lower_module`.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from fluxkiln.compile.doctor import installed_version
from fluxkiln.errors import CompileError, ToolchainError
from fluxkiln.types import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

RunDtype = Literal["float32", "bfloat16"]

# what this file was written for; jaxlib first, as the others follow from it
VERSIONS: Mapping[str, str] = {"jaxlib": "0.10.2", "jax": "0.10.2", "torchax": "0.0.13"}
_INPUT_DTYPES = ("float32", "bfloat16", "int32", "bool")
_AXIS = "ranks"
# torchax's environment is one for all threads, and so are Python's warnings
_one_at_a_time = threading.Lock()


class _Collectives(Protocol):
    """What a module is given to speak with the other ranks; the same as in `fluxkiln.patches.cut`."""

    @property
    def ranks(self) -> int: ...

    def all_reduce(self, x: Tensor) -> Tensor: ...

    def all_gather(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Lowered:
    """An HLO module proto of one rank as the frontend gives it, its parameters in order, its outputs in order."""

    proto: bytes
    parameters: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def lower_module(
    make_module: Callable[[_Collectives], Module], inputs: Sequence[TensorSpec], ranks: int, dtype: RunDtype
) -> Lowered:
    """Trace a module and lower it; nothing is computed and no weight exists.

    Args:
        make_module: gives the module of one rank, on the meta device, with local shapes, whose forward takes `inputs`
            in order and returns a tensor or a tuple of them. The collectives it is given work within this call only.
        inputs: activations with their final dtypes; float32 stays float32 whatever `dtype` is.
        ranks: how many replicas run the proto at once; with one there is no collective in it.
        dtype: what floating-point parameters are cast to.

    Returns:
        The proto as the frontend made it, see `hlo_module.canonicalise`. Its parameters are `inputs`, then the module's
        `named_parameters()`; its root is a tuple of the outputs, whatever their number.

    Raises:
        ToolchainError: jax, jaxlib or torchax is missing or of another version.
        CompileError: the module is not on the meta device, or does what the frontend has no lowering for.
    """
    import jax
    import torch

    with _one_at_a_time:
        torchax = load_frontend()
        module = make_module(_Psum(ranks)).eval().requires_grad_(False)
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(getattr(torch, dtype))
        weights = dict(module.named_parameters())
        slots = [TensorSpec(name, tuple(w.shape), str(w.dtype).removeprefix("torch.")) for name, w in weights.items()]
        _refuse_illegal(module, inputs, slots)
        parameters = (*inputs, *slots)

        def run(*arrays: Any) -> Any:
            tensors = torchax.j2t_iso(list(arrays))
            activations, given = tensors[: len(inputs)], tensors[len(inputs) :]
            # functions that jax would compile apart become part of this one
            with jax.disable_jit(), torch.no_grad(), torchax:
                state = dict(zip(weights, given, strict=True)) | _constants(module, torchax)
                result = torch.func.functional_call(module, state, tuple(activations))
                made = tuple(result) if isinstance(result, tuple | list) else (result,)
                return torchax.t2j_iso(torchax.v2t_iso(made))

        arguments = [jax.ShapeDtypeStruct(spec.shape, spec.dtype) for spec in parameters]
        with _reported_as_compile_errors(), jax.default_matmul_precision("highest"), jax.enable_x64(False):
            traced = jax.jit(_on_ranks(run, ranks), keep_unused=True).trace(*arguments)
            stablehlo = traced.lower(lowering_platforms=("cpu",)).compiler_ir("stablehlo")
        outputs = tuple(
            TensorSpec(f"output_{index}", tuple(out.shape), str(out.dtype))
            for index, out in enumerate(jax.tree.leaves(traced.out_info))
        )
        return Lowered(_to_hlo(stablehlo, ranks), parameters, outputs)


class _Psum:
    """Collectives of the frontend: operations of the graph, except that one rank has nobody to speak to."""

    def __init__(self, ranks: int) -> None:
        if ranks < 1:
            raise CompileError(f"{ranks} ranks: a module is lowered for one at least")
        self.ranks = ranks

    def all_reduce(self, x: Tensor) -> Tensor:
        import jax

        return x if self.ranks == 1 else _on_jax(lambda array: jax.lax.psum(array, _AXIS), x)

    def all_gather(self, x: Tensor) -> Tensor:
        import jax

        if self.ranks == 1:
            return x.unsqueeze(0)
        return _on_jax(lambda array: jax.lax.all_gather(array, _AXIS), x)


def _on_jax(function: Callable[[Any], Any], x: Tensor) -> Tensor:
    environment = load_frontend()
    result: Tensor = environment.j2t_iso(function(environment.t2j_iso(environment.v2t_iso(x))))
    return result


def _on_ranks(function: Callable[..., Any], ranks: int) -> Callable[..., Any]:
    """`function` in the place of one of `ranks` devices, which need not exist."""
    import jax
    from jax.sharding import AbstractMesh, PartitionSpec

    if ranks == 1:  # a mesh of one device leaves no trace in the graph
        return function
    mesh, every = AbstractMesh((ranks,), (_AXIS,)), PartitionSpec()
    mapped: Callable[..., Any] = jax.shard_map(function, mesh=mesh, in_specs=every, out_specs=every, check_vma=False)
    return mapped


def _to_hlo(stablehlo: Any, ranks: int) -> bytes:
    """The proto of a StableHLO module in cross-replica form, equal expressions merged."""
    from jaxlib import _jax
    from jaxlib.mlir.passmanager import PassManager

    with stablehlo.context:
        if ranks > 1:
            _unwrap_manual_computation(stablehlo)
        _drop_channels(stablehlo.operation)
        PassManager.parse("builtin.module(cse,symbol-dce)").run(stablehlo.operation)
        buffer = io.BytesIO()
        stablehlo.operation.write_bytecode(buffer)
    computation = _jax.mlir.mlir_module_to_xla_computation(buffer.getvalue(), use_tuple_args=False, return_tuple=True)
    proto: bytes = computation.as_serialized_hlo_module_proto()
    return proto


def _unwrap_manual_computation(stablehlo: Any) -> None:
    """Put the body of the one `sdy.manual_computation` in its place: what every replica runs."""
    meshes = [op for op in stablehlo.body.operations if op.operation.name == "sdy.mesh"]
    found = [
        op.operation
        for function in stablehlo.body.operations
        if function.operation.name == "func.func"
        for op in function.regions[0].blocks[0].operations
        if op.operation.name == "sdy.manual_computation"
    ]
    if len(found) != 1:
        raise CompileError(
            f"jax made {len(found)} manual computations of a module, one is expected; use the pinned versions: "
            + ", ".join(f"{name} {version}" for name, version in VERSIONS.items())
        )
    manual = found[0]
    body = manual.regions[0].blocks[0]
    for inner, outer in zip(body.arguments, manual.operands, strict=True):
        inner.replace_all_uses_with(outer)
    *operations, end = list(body.operations)
    for operation in operations:
        operation.operation.move_before(manual)
    for outer, inner in zip(manual.results, end.operation.operands, strict=True):
        outer.replace_all_uses_with(inner)
    manual.erase()
    for mesh in meshes:
        mesh.operation.erase()


def _drop_channels(module: Any) -> None:
    """Without a channel and global device ids, replica groups name replicas: the classic form."""
    from jaxlib.mlir import ir

    def drop(operation: Any) -> Any:
        for name in ("channel_handle", "use_global_device_ids"):
            if name in operation.attributes:
                del operation.attributes[name]
        return ir.WalkResult.ADVANCE

    module.walk(drop)


def _constants(module: Module, torchax: Any) -> dict[str, Any]:
    """Buffers with values; one on the meta device has none and may only be there unread."""
    import torch

    made = {}
    for name, buffer in module.named_buffers():
        if buffer.device.type != "meta":
            narrow = buffer.to(torch.int32) if buffer.dtype == torch.int64 else buffer
            made[name] = torchax.j2t_iso(torchax.t2j_copy(narrow))
    return made


def _refuse_illegal(module: Module, inputs: Sequence[TensorSpec], slots: Sequence[TensorSpec]) -> None:
    for name, parameter in module.named_parameters():
        if parameter.device.type != "meta":
            raise CompileError(
                f"parameter {name} is on {parameter.device}: weights are arguments of a lowered module and must not "
                'exist; make it within `with torch.device("meta")`'
            )
    for spec in (*inputs, *slots):
        if spec.dtype not in _INPUT_DTYPES:
            raise CompileError(
                f"{spec.name} has dtype {spec.dtype}, Neuron takes {', '.join(_INPUT_DTYPES)}; give token ids as int32"
            )


@contextlib.contextmanager
def _reported_as_compile_errors() -> Iterator[None]:
    """What torchax and jax say of a module that cannot be lowered, as errors of ours; jax narrows float64 silently."""
    from torchax.tensor import OperatorNotFound

    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            yield
        except (OperatorNotFound, NotImplementedError) as error:
            raise CompileError(
                f"the module cannot be lowered: {error}; write it with other operators or add the operator to "
                "fluxkiln/compile/toolchains/neuron/operators.py"
            ) from error
        except AssertionError as error:
            if "mixed math" not in str(error):
                raise
            raise CompileError(
                "the module reads a tensor that is neither an input nor a parameter nor a buffer with values; make "
                "constants on the device of an input"
            ) from error
    for warning in heard:
        text = str(warning.message)
        if "float64" in text or "complex128" in text:
            raise CompileError(
                f"the module computes in double precision, Neuron has none: {text.splitlines()[0]}; use float32, or "
                "compute it on the host"
            )
        if "int64" not in text:  # ids and positions fit 32 bits
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def require_versions() -> None:
    """Raise ToolchainError if jax, jaxlib or torchax is missing or of another version than this was written for."""
    for name, wanted in VERSIONS.items():
        found = installed_version(name) or "not installed"
        if found != wanted:
            raise ToolchainError(
                f"{name}: {found}; lowering for Neuron needs {name} {wanted} exactly: pip install 'fluxkiln[trn1]'"
            )


@functools.cache
def load_frontend() -> Any:
    """torchax's environment, with operators of ours; errors as `require_versions`."""
    require_versions()
    import jax

    jax.config.update("jax_platforms", "cpu")
    with _torch_as_torchax_knows_it():
        from torchax import tensor
        from torchax.ops.ops_registry import Operator

        environment = tensor.Environment()
    from fluxkiln.compile.toolchains.neuron.operators import replacements

    for operator, function in replacements().items():
        environment._ops[operator] = Operator(
            operator, function, is_jax_function=True, is_user_defined=True, needs_env=False, is_view_op=False
        )
    # torchax's own changes the tensor it is called on
    tensor.Tensor.type_as = lambda self, other: self.to(other.dtype)
    return environment


@contextlib.contextmanager
def _torch_as_torchax_knows_it() -> Iterator[None]:
    """While torchax is imported: overloads for named dimensions, gone since torch 2.13, stand for themselves.

    What the import changes globally is put back: torch's fast path of attention and an environment variable.
    """
    import torch
    from torch._ops import OpOverloadPacket

    lookup: Any = OpOverloadPacket.__getattr__

    def with_names(packet: Any, overload: str) -> Any:
        try:
            return lookup(packet, overload)
        except AttributeError:
            if "dimname" in overload.lower() or "names" in overload.split("_"):
                return (str(packet), overload)  # a key of torchax's tables that nothing will look up
            raise

    fast_path = torch.backends.mha.get_fastpath_enabled()
    environ = dict(os.environ)
    OpOverloadPacket.__getattr__ = with_names  # type: ignore[method-assign]
    try:
        yield
    finally:
        OpOverloadPacket.__getattr__ = lookup  # type: ignore[method-assign]
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for name in set(os.environ) - set(environ):
            del os.environ[name]
