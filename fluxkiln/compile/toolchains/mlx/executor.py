"""Bundles for MLX, run by it: their graphs operation by operation, on the weights that lie in their files."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fluxkiln.compile.bundle import Bundle
from fluxkiln.compile.linker import GraphExecutor
from fluxkiln.compile.plan import Plan
from fluxkiln.compile.toolchains.mlx.environment import mlx_environment
from fluxkiln.compile.toolchains.mlx.file import layout_of, planes_of, read_components
from fluxkiln.compile.toolchains.mlx.graphs import GRAPHS_FILE, Constant, Graph, read_graphs
from fluxkiln.compile.toolchains.mlx.operations import Codes, known_operations
from fluxkiln.errors import CompileError, ToolchainError, UsageError
from fluxkiln.export.bindings import bind_part, read_slots
from fluxkiln.export.checkpoint import Checkpoint, read_tensor
from fluxkiln.quantize.formats import Format
from fluxkiln.quantize.schemes import parse_scheme
from fluxkiln.types import Part, TensorRef, TensorSpec, Transform, find_part

if TYPE_CHECKING:
    from numpy.typing import NDArray

# what MLX's FLUX example makes of its linear layers when it is asked for codes, and of which
BITS, GROUP, COLUMNS = 4, 64, 512


def load_mlx() -> Any:
    """`mlx.core`, of this environment or of the one that `make env-mlx` made; ToolchainError where neither has it."""
    with _beside(mlx_environment().root):
        try:
            return importlib.import_module("mlx.core")
        except ImportError as error:
            raise ToolchainError(
                f"MLX is not installed ({error}); pip install mlx, 'mlx[cpu]' on Linux, or make env-mlx in a checkout"
            ) from error


@contextmanager
def _beside(root: Any) -> Iterator[None]:
    """The packages of another environment found after all others, if it has this Python's."""
    folder = str(root / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages")
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def as_build(bundle: Bundle) -> tuple[Checkpoint, Plan]:
    """What a bundle was made of, as far as its files are planned and read by it: shapes of tensors, not their bytes."""
    manifest, model = bundle.manifest, bundle.model
    tensors: dict[str, dict[str, TensorRef]] = {}
    for folder in dict.fromkeys(part.folder for part in bundle.parts):
        shapes = model.layout(folder, bundle.configs[folder])
        names = model.state_names(folder, shapes)
        tensors[folder] = {
            name: TensorRef(name, bundle.folder, "BF16", shapes[stored], 0, 0) for name, stored in names.items()
        }
    schemes = {entry.kind: parse_scheme(entry.scheme) for entry in manifest.parts}
    checkpoint = Checkpoint(bundle.folder, manifest.name, manifest.variant, bundle.configs, tensors, {}, None, model)
    return checkpoint, Plan(bundle.target, manifest.shapes, schemes, bundle.parts, bundle.folder)


@dataclass(frozen=True, slots=True)
class LoadedPart:
    """A part that is open: its graph, and its weights and constants as MLX has them."""

    graph: Graph
    weights: Mapping[str, Any]
    constants: Mapping[str, Any]


class MlxExecutor(GraphExecutor):
    """See `compile.linker.GraphExecutor`.

    Args:
        options: `device`, cpu or gpu. `quantize`: products whose weights are in no codes get those that MLX's FLUX
            example makes when it is asked for some. `no-t5-padding`: text may have fewer tokens than the bundle's.

    Raises:
        ToolchainError: MLX or the device is not there. UsageError: no device, or codes of weights that are in codes.
    """

    name = "mlx"

    def __init__(self, bundle: Bundle, options: Mapping[str, Any]) -> None:
        super().__init__({part.name: part.component for part in bundle.parts})
        self.checkpoint, self.plan = as_build(bundle)
        self.quantize = bool(options.get("quantize"))
        if self.quantize and (coded := [s.name for s in self.plan.schemes.values() if s.weight_bits]):
            raise UsageError(f"--quantize: the weights of this bundle are in codes already, {coded[0]}; leave it out")
        self.mx = load_mlx()
        self.device = self._find_device(options.get("device"))
        self.run_by = known_operations(self.mx)
        self.graphs = read_graphs(bundle.folder / GRAPHS_FILE)
        self.files = {file.path: bundle.folder / file.path for file in bundle.manifest.files}
        self.readers: dict[str, Any] = {}

    def _find_device(self, asked: Any) -> Any:
        mx = self.mx
        found = [name for name in ("cpu", "gpu") if mx.is_available(getattr(mx, name))]
        if isinstance(asked, int) or (asked and asked.lower() not in ("cpu", "gpu")):
            raise UsageError(f"--device {asked}: MLX's devices are cpu and gpu")
        if asked and asked.lower() not in found:
            raise ToolchainError(f"--device {asked}: MLX finds {', '.join(found)} on this machine; name one of these")
        return getattr(mx, asked.lower() if asked else found[-1])

    @cached_property
    def version(self) -> str:
        import importlib.metadata

        with _beside(mlx_environment().root):
            return importlib.metadata.version("mlx")

    @property
    def facts(self) -> Mapping[str, str]:
        codes = f", weights in {BITS}-bit codes made now" if self.quantize else ""
        arithmetic = "float32" if self.device == self.mx.cpu else "bfloat16 where the scheme has it"
        return {"runtime": f"MLX {self.version}", "device": f"{self.device.name}, {arithmetic}{codes}"}

    def open(self, part: str) -> LoadedPart:
        """A part with its weights; errors as a call."""
        found = find_part(self.plan.parts, part)
        graph = self.graphs["kinds"].get(found.kind)
        if graph is None:
            raise CompileError(f"{GRAPHS_FILE} has no graph of {found.kind}; build the bundle again")
        if odd := {one["type"] for one in graph["operations"]} - self.run_by.keys():
            raise CompileError(f"{found.kind} has operations that MLX is not given here: {', '.join(sorted(odd))}")
        with _said(part), self.mx.stream(self.device):
            dtype = self._dtype(found)
            constants = {
                name: _constant(self.mx, one, dtype)
                for name, one in graph["constants"].items()
                if "by_token" not in one
            }
            return LoadedPart(graph, self._weights(found, graph), constants)

    def _dtype(self, part: Part) -> Any:
        """Of activations: as OpenVINO's, sines of the timestep need float32, and CPUs compute all in it."""
        plain = self.device == self.mx.cpu or part.traits.timed or self.plan.scheme(part).arithmetic != "BF16"
        return self.mx.float32 if plain else self.mx.bfloat16

    def _weights(self, part: Part, graph: Graph) -> dict[str, Any]:
        mx, folder = self.mx, part.folder
        if folder not in self.readers:
            file = layout_of(self.checkpoint, self.plan.target.chip, folder).file
            own = {name: path for name, path in self.files.items()
                   if name == file or (not file and name.startswith(f"{folder}/"))}  # fmt: skip
            context = self.checkpoint, self.plan, folder, own
            self.readers[folder] = read_components(*context), planes_of(*context)
        read, planes = self.readers[folder]
        slots = tuple(TensorSpec(name, tuple(shape)) for name, shape in graph["slots"].items())
        binding = bind_part(part, slots, self.checkpoint)
        dense, made = read_slots(binding, read), {}
        stored = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}[self.plan.scheme(part).arithmetic]
        for bound in binding.slots:
            source, turned = bound.sources[0], any(step.op == "transpose" for step in bound.transforms)
            if source in planes and not any(step.op == "scale" for step in bound.transforms):
                made[bound.slot] = replace(self._stored_codes(planes[source], bound.transforms), turned=turned)
                continue
            weight = mx.array(dense(bound.slot))
            weight = weight if source in planes else weight.astype(stored)
            multiplied = weight.ndim == 2 and not source.endswith(part.traits.tables)
            if self.quantize and multiplied and weight.shape[1] % COLUMNS == 0:
                made[bound.slot] = Codes(mx.quantize(weight, GROUP, BITS), BITS, GROUP, turned)
            else:
                made[bound.slot] = weight.T if turned else weight
        mx.eval([one.planes if isinstance(one, Codes) else one for one in made.values()])
        return made

    def _stored_codes(self, stored: tuple[Format, list[TensorRef]], steps: Sequence[Transform]) -> Codes:
        """A matrix in codes as it lies in the files, without what its slot leaves out."""
        (form, refs), mx = stored, self.mx
        codes, scales, biases = (read_tensor(ref) for ref in refs)
        halves = (mx.array(plane.view("u2")).view(mx.bfloat16) for plane in (scales, biases))
        made = Codes((mx.array(codes.view("u4")), *halves), form.bits, form.group)
        for step in steps:
            made = made.cut(step.dim, step.start, step.stop) if step.op == "slice" else made
        return made

    def run(self, session: LoadedPart, part: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        import numpy as np

        mx, graph = self.mx, session.graph
        more = self._more_tokens(part, graph, inputs)
        with _said(part), mx.stream(self.device):
            dtype = self._dtype(find_part(self.plan.parts, part))
            values = {**session.weights, **session.constants}
            for name, array in inputs.items():
                given = mx.array(np.ascontiguousarray(array))
                values[name] = given if given.dtype in (mx.int32, mx.int64) else given.astype(dtype)
            values |= {name: _constant(mx, one, dtype, more)
                       for name, one in graph["constants"].items() if "by_token" in one}  # fmt: skip
            for one in graph["operations"]:
                taken = (values[name] if name else None for name in one["inputs"])
                found = self.run_by[one["type"]](one["how"], *taken)
                values |= zip(one["outputs"], found if isinstance(found, list | tuple) else (found,), strict=True)
            made = {name: values[name].astype(mx.float32) for name in graph["outputs"]}
            del values
            mx.eval(made)
        return {name: np.array(array) for name, array in made.items()}

    def _more_tokens(self, part: str, graph: Graph, inputs: Mapping[str, NDArray[Any]]) -> int:
        """How many text tokens more than the bundle's the inputs are for; CompileError for any other shapes."""
        wanted = {one["name"]: one for one in graph["inputs"]}
        if odd := sorted(wanted.keys() ^ inputs.keys()):
            raise CompileError(f"part {part} takes {', '.join(wanted)}: {', '.join(odd)} is missing or one too many")
        grown = [(inputs[name].shape, one["shape"], one["by_token"]) for name, one in wanted.items()]
        more = [have - size for shape, sizes, added in grown
                for have, size, by_token in zip(shape, sizes, added, strict=False) if by_token]  # fmt: skip
        for (shape, sizes, added), name in zip(grown, wanted, strict=True):
            here = [size + by_token * more[0] if more else size for size, by_token in zip(sizes, added, strict=True)]
            if list(shape) != here:
                raise CompileError(
                    f"part {part}: input {name} has shape {list(shape)}, it was made for {sizes}; use the size and "
                    "token count of the build"
                )
        return more[0] if more else 0


@contextmanager
def _said(part: str) -> Iterator[None]:
    """A graph that does not fit its weights, or itself, ends in a sentence: a CompileError."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CompileError(
            f"MLX could not run part {part} ({type(error).__name__}: {error}); build or fetch the bundle again"
        ) from error


def _constant(mx: Any, one: Constant, dtype: Any, more: int = 0) -> Any:
    """A constant: whole numbers as a list, or one as it is; others as MLX has them."""
    values = one["values"]
    if one["dtype"].startswith("int"):
        values = values * math.prod(one["shape"]) if len(values) == 1 else values
        whole = [
            value + more * added for value, added in zip(values, one.get("by_token", [0] * len(values)), strict=True)
        ]
        return whole if one["shape"] else whole[0]
    kind = mx.bool_ if one["dtype"] == "bool" else dtype
    made = mx.full(one["shape"], values[0]) if len(values) == 1 else mx.array(values).reshape(one["shape"])
    return made.astype(kind)
