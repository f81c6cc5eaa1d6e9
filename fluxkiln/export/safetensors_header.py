"""Safetensors files: where every tensor lies, by the header alone, how a header is written, and how bytes are read.

Source: the format section of https://github.com/huggingface/safetensors, README: a little-endian u64 with the length of
the header, a JSON object, then the tensors' bytes without holes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from fluxkiln.documents import DocumentLimits, read_object
from fluxkiln.errors import CheckpointError
from fluxkiln.files import open_regular
from fluxkiln.types import TensorRef

MAX_HEADER_BYTES = 100_000_000
MAX_AXES = 16
# A tensor has a dozen entries: room for 160,000, where FLUX.1's largest file has 1,500.
HEADER_LIMITS = DocumentLimits(nbytes=MAX_HEADER_BYTES, entries=2_000_000, depth=4, digits=20)
ITEM_BYTES: Mapping[str, int] = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
_REFETCH = "fetch or copy the file again"


def read_header(file: Path) -> dict[str, TensorRef]:
    """Every tensor of one safetensors file, in the order of their bytes, with absolute offsets.

    Raises:
        CheckpointError: the file cannot be read, is shorter or longer than its header says, or the header is damaged.
    """
    try:
        with open_regular(file) as stream:
            file_bytes = stream.seek(0, 2)
            stream.seek(0)
            prefix = stream.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{file} has {file_bytes} bytes, a safetensors file has at least 8; {_REFETCH}")
            header_bytes = int.from_bytes(prefix, "little")
            if prefix == b"version ":
                raise CheckpointError(f"{file} is a Git LFS pointer, not the weights; run `git lfs pull` in its folder")
            if header_bytes > min(MAX_HEADER_BYTES, file_bytes - 8):
                raise CheckpointError(
                    f"{file} claims a header of {header_bytes} bytes, but it has {file_bytes} bytes and a header may "
                    f"have {MAX_HEADER_BYTES}; it is truncated or no safetensors file: {_REFETCH}"
                )
            raw = stream.read(header_bytes)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}; {_REFETCH}") from error
    return _parse_header(file, raw, 8 + header_bytes, file_bytes)


def encode_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]],
    metadata: Mapping[str, str] | None = None,
    separators: tuple[str, str] = (", ", ": "),
) -> bytes:
    """The start of a file with tensors by name, dtype and shape; their bytes follow in this order.

    Padded as safetensors' own writer does, so that they start at a multiple of 8. `separators` are json's.
    """
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, dtype, shape in tensors:
        start, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(entries, separators=separators).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def read_into(stream: FileIO, view: memoryview, ref: TensorRef) -> None:
    """Fill `view` with bytes of a tensor from where its file stands; CheckpointError where the file ends before."""
    while view:
        count = stream.readinto(view)
        if not count:
            raise CheckpointError(f"{ref.file} ends inside {ref.name}; it was truncated: copy or fetch it again")
        view = view[count:]


def _parse_header(file: Path, raw: bytes, data_start: int, file_bytes: int) -> dict[str, TensorRef]:
    header = read_object(
        raw, f"the header of {file}", error=CheckpointError, remedy=_REFETCH, limits=HEADER_LIMITS
    )  # fmt: skip
    header.pop("__metadata__", None)
    refs = sorted(
        (_parse_entry(file, name, entry, data_start) for name, entry in header.items()),
        key=lambda ref: (ref.offset, ref.nbytes),
    )
    end = data_start
    for ref in refs:
        if ref.offset != end:
            raise CheckpointError(
                f"{ref.name} in {file} starts at byte {ref.offset}, the tensor before it ends at {end}: the format "
                f"allows neither holes nor overlaps; {_REFETCH}"
            )
        end += ref.nbytes
    if end != file_bytes:
        problem = "it is truncated" if file_bytes < end else "it was appended to"
        raise CheckpointError(f"{file} has {file_bytes} bytes, its header promises {end}: {problem}; {_REFETCH}")
    return {ref.name: ref for ref in refs}


def _parse_entry(file: Path, name: str, entry: Any, data_start: int) -> TensorRef:
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        well_formed = (
            isinstance(shape, list)
            and len(shape) <= MAX_AXES
            and all(type(n) is int and n >= 0 for n in (*shape, start, stop))
        )
    except (TypeError, KeyError, ValueError):
        well_formed = False
    if not well_formed:
        raise CheckpointError(f"the header of {file} describes {name!r:.80} as {str(entry)[:80]}; {_REFETCH}")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(
            f"{name} in {file} has the dtype {dtype!r}; known are {', '.join(ITEM_BYTES)}: convert it to BF16"
        )
    if stop - start != math.prod(shape) * ITEM_BYTES[dtype]:
        raise CheckpointError(
            f"{name} in {file} has {stop - start} bytes, but {dtype} {shape} takes "
            f"{math.prod(shape) * ITEM_BYTES[dtype]}; {_REFETCH}"
        )
    return TensorRef(name, file, dtype, tuple(shape), data_start + start, stop - start)
