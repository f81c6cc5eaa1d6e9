"""ONNX tensors whose bytes lie in other files: ranges of safetensors shards, and files that weights are appended to.

Which files a graph may name, tried with onnxruntime 1.31.1, onnx 1.23.2 and onnx-ir 1.1.0:

    where the file lies                              ONNX Runtime    onnx, onnx-ir
    in or below the graph's folder                   yes             yes
    a hard link there                                yes             no (a file with one name only)
    a symbolic link there to a file in there         yes             onnx no, onnx-ir yes
    a symbolic link, or a linked folder, to outside  no              no
    `../x`, an absolute path                         no              no

So a Hugging Face snapshot, whose files are symbolic links into `blobs/`, cannot hold a graph; the folder above both
can, naming `blobs/...`. Offsets need no alignment. Two ways around the first line need words in the program that opens
the graph: the session option `session.model_external_initializers_file_folder_path` names another folder (`/` works),
and `SessionOptions.add_external_initializers_from_files_in_memory` takes a memory map for a file's name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from fluxkiln.errors import CompileError
from fluxkiln.types import TensorRef

if TYPE_CHECKING:
    from onnx import TensorProto

ALIGNMENT = 64
# safetensors' dtypes that ONNX Runtime reads in place, by ONNX's names
READABLE: Mapping[str, str] = {"F32": "FLOAT", "BF16": "BFLOAT16", "F16": "FLOAT16"}
_STORABLE: Mapping[Any, str] = {
    np.dtype(np.float32): "FLOAT",
    np.dtype(ml_dtypes.bfloat16): "BFLOAT16",
    np.dtype(np.float16): "FLOAT16",
    np.dtype(np.uint8): "UINT8",
}


def in_place_tensor(name: str, ref: TensorRef, folder: Path) -> TensorProto:
    """An initializer that is the checkpoint's own bytes.

    Raises:
        CompileError: the file is not in or below `folder`, ONNX Runtime does not know its dtype, or LoRAs change it.
    """
    import onnx

    if ref.change:
        raise CompileError(f"tensor {ref.name} has LoRAs in it, so no file has its bytes; fuse them into a checkpoint")
    if ref.dtype not in READABLE:
        raise CompileError(
            f"tensor {ref.name} is stored as {ref.dtype}, {', '.join(READABLE)} can be read in place; "
            "convert it to BF16"
        )
    try:
        location = ref.file.resolve().relative_to(folder.resolve())
    except ValueError:
        raise CompileError(
            f"tensor {ref.name} lies in {ref.file}, ONNX Runtime opens files below {folder} only; put the file or a "
            "hard link to it there"
        ) from None
    dtype = onnx.TensorProto.DataType.Value(READABLE[ref.dtype])
    return external_tensor(name, dtype, ref.shape, location.as_posix(), ref.offset, ref.nbytes)


def external_tensor(
    name: str, data_type: int, shape: Sequence[int], location: str, offset: int, length: int
) -> TensorProto:
    """An initializer that is a range of bytes of the file `location`, named from the graph's folder."""
    import onnx

    tensor = onnx.TensorProto(name=name, data_type=data_type, dims=shape, data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    return tensor


class Sidecar:
    """A file that weights are appended to, for one graph or for several; not made before the first of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._tensors: dict[str, TensorProto] = {}

    def append(self, name: str, array: NDArray[Any]) -> None:
        """Write `array` and remember where it lies as initializer `name`."""
        import onnx

        stored = np.ascontiguousarray(array if array.dtype in _STORABLE else array.astype(np.float32))
        with self.path.open("ab" if self.size else "wb") as file:
            file.write(bytes(-self.size % ALIGNMENT))
            offset = file.tell()
            file.write(stored.view(np.uint8).data)
            self.size = file.tell()
        dtype = onnx.TensorProto.DataType.Value(_STORABLE[stored.dtype])
        self._tensors[name] = external_tensor(name, dtype, stored.shape, self.path.name, offset, stored.nbytes)

    def take(self) -> dict[str, TensorProto]:
        """The initializers appended since the last call, by name."""
        taken, self._tensors = self._tensors, {}
        return taken


def external_range(tensor: TensorProto) -> tuple[str, int, int]:
    """File (relative to the graph's folder), offset and length of a tensor that lies outside the graph.

    Raises: KeyError, ValueError: it names no file, or no place in one.
    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if not isinstance(entries["location"], str):  # protobuf gives bytes where they are no UTF-8
        raise ValueError(f"its file is called {entries['location']!r}")
    return entries["location"], int(entries.get("offset", 0)), int(entries.get("length", 0))
