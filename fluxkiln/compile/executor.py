"""What an executor is: parts of a bundle by name, from numpy to numpy."""

from __future__ import annotations

import importlib
import importlib.util
import platform
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fluxkiln.compile.plan import Binary
from fluxkiln.errors import CompileError, ToolchainError, UsageError
from fluxkiln.types import Kind, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray


# dtypes whose values `to_bits16` makes
BITS16 = ("bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Net:
    """One compiled part: the file that it is in, its name there, and what it takes and gives, in the net's order.

    dtypes are the manifest's words: `float32`, `bfloat16`, `float16`, `int32`, `int64`.
    """

    part: str
    kind: Kind
    file: Path
    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    size: int = 0

    @property
    def component(self) -> str:
        return self.kind.component


def bind_net(binary: Binary, file: Path) -> Net:
    """The net of a part in a file of the bundle, its inputs and outputs by its kind's names."""
    kind = binary.part.traits
    inputs, outputs = (_name(binary.facts[side], getattr(kind, side)) for side in ("inputs", "outputs"))
    return Net(binary.part.name, kind, file, binary.net, inputs, outputs, binary.size)


def _name(tensors: Any, names: tuple[str, ...]) -> tuple[TensorSpec, ...]:
    if {name for name, _, _ in tensors} <= set(names):  # an input that a model lacks is not the last one then
        names = tuple(name for name, _, _ in tensors)
    return tuple(TensorSpec(name, tuple(shape), dtype) for name, (_, dtype, shape) in zip(names, tensors, strict=False))


class Executor(Protocol):
    """Runs the parts of one bundle. One thread at a time.

    What a part needs is loaded when the part is first run, or by `load`, and stays until its component is released.
    """

    name: str

    def __call__(self, part: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The part's outputs by its kind's names, float32, for inputs of the build's shapes, float32 or integers.

        Raises:
            CompileError: no such part, an input is missing or of another shape, or the run failed.
            IntegrityError: a file is damaged. ResourceError: memory ran out.
        """

    def load(self, component: str) -> None:
        """Load all parts of a component now; errors as a call."""

    def release(self, component: str) -> None:
        """Let go of a component's memory; its parts are loaded again when they are run."""

    def drop(self, part: str) -> None:
        """Let go of one part's memory, if its runtime can: it ran, and is not needed again soon."""

    def close(self) -> None:
        """Let go of everything."""

    @property
    def facts(self) -> Mapping[str, str]:
        """What runs, for people: runtime, version, device."""


def find_net(nets: Mapping[str, Net], part: str) -> Net:
    """The net of a part; CompileError with the parts that there are otherwise."""
    if part not in nets:
        raise CompileError(f"the bundle has no part {part!r}; it has {', '.join(nets)}")
    return nets[part]


def check_inputs(net: Net, inputs: Mapping[str, NDArray[Any]]) -> None:
    """Raise CompileError unless `inputs` are the net's, in name and shape."""
    specs = {spec.name: spec for spec in net.inputs}
    if odd := sorted(specs.keys() ^ inputs.keys()):
        raise CompileError(f"part {net.part} takes {', '.join(specs)}: {', '.join(odd)} is missing or one too many")
    for name, spec in specs.items():
        if tuple(inputs[name].shape) != spec.shape:
            raise CompileError(
                f"part {net.part}: input {name} has shape {list(inputs[name].shape)}, it was compiled for "
                f"{list(spec.shape)}; use the size and token count of the build"
            )


def require_file(net: Net) -> None:
    """Raise UsageError when the file that a net is in is not there."""
    if not net.file.is_file():
        raise UsageError(
            f"{net.file} does not exist, and part {net.part} is in it: the bundle is without the executor's binaries; "
            "build it again or pull the whole of it"
        )


def load_runtime(module: str, needs: str, remedy: str) -> Any:
    """A vendor's runtime library.

    Args:
        needs: whose it is and which executor needs it, for the message.

    Raises:
        ToolchainError: it is not installed, or it was made for another machine or another Python.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        spec = importlib.util.find_spec(module.partition(".")[0])
        folders = [Path(folder) for folder in spec.submodule_search_locations or ()] if spec is not None else []
        own = sysconfig.get_config_var("EXT_SUFFIX")
        names = [path.name for folder in folders for path in sorted(folder.rglob("*.cpython-*.so"))]
        others = [name for name in names if not name.endswith(own)]
        reason = (
            f"what is here, {others[0]}, is for another machine or Python than this one ({platform.machine()}, {own})"
            if others
            else f"it is not here ({error})"
        )
        raise ToolchainError(f"{needs}, and {reason}; {remedy}") from error


def to_bits16(array: NDArray[Any], dtype: str) -> NDArray[Any]:
    """An array as a 16-bit runtime takes it, the bits as uint16: bfloat16 to nearest, ties to even, or float16."""
    import numpy as np

    if dtype == "bfloat16":
        bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
        rounded: NDArray[Any] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return rounded
    return np.ascontiguousarray(array, np.float16).view(np.uint16)


def from_bits16(bits: NDArray[Any], dtype: str) -> NDArray[Any]:
    """float32 of what `to_bits16` makes."""
    import numpy as np

    if dtype == "bfloat16":
        return (np.ascontiguousarray(bits).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.ascontiguousarray(bits).view(np.float16).astype(np.float32)
