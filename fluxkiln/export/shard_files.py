"""The weights of every rank as files, cut from the checkpoint in one pass, and back.

`weights/<part>/tp<rank>.safetensors` has the slots of a part in their order, bfloat16. A part's tensors are read once
for all its ranks, some rows at a time, whatever their size; the digest of each file is taken while it is written.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.errors import CheckpointError, IntegrityError, ResourceError
from fluxkiln.export.bindings import Window, window_of
from fluxkiln.export.checkpoint import FLOAT_DTYPES, Checkpoint, read_rows, read_tensor
from fluxkiln.export.safetensors_header import ITEM_BYTES, encode_header, read_header, read_into
from fluxkiln.files import rename_durably
from fluxkiln.types import Binding, TensorRef, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


DTYPE = "BF16"
_BLOCK_BYTES = 4 << 20
# twice the usual two cores: half of them wait until their files are on the disk
WORKERS = 4


@dataclass(frozen=True, slots=True)
class ShardFile:
    """The weights of one rank of one part. `sha256` is of the file's bytes."""

    part: str
    rank: int
    path: Path
    sha256: str
    nbytes: int


def write_part(
    slots: tuple[TensorSpec, ...], bindings: Sequence[Binding], checkpoint: Checkpoint, folder: Path
) -> tuple[ShardFile, ...]:
    """Write the shards of every rank of one part to `folder`, in the order of the ranks.

    A file appears under its name when it is complete and on the disk; what was there is replaced. Memory: 20 MB,
    whatever the size of tensors.

    Args:
        slots: with the shapes of a rank. bindings: of each rank, see `bindings.bind_shard`.

    Raises:
        CheckpointError: a tensor has a dtype that is not converted, or its file ends too early.
        ResourceError: the disk is full or cannot be written to.
    """
    part, refs = bindings[0].part, checkpoint.tensors[bindings[0].component]
    (folder / part).mkdir(parents=True, exist_ok=True)
    header = encode_header((spec.name, DTYPE, spec.shape) for spec in slots)
    with ExitStack() as stack:
        paths = (folder / part / f"tp{rank}.safetensors" for rank in range(len(bindings)))
        files = [stack.enter_context(_PartialFile(path)) for path in paths]
        spread = _Spreader(stack, files)
        for file in files:
            file.write(header)
        for places in zip(*(binding.slots for binding in bindings), strict=True):
            ref = refs[places[0].sources[0]]
            spread(ref, [window_of(ref.shape, place.transforms) for place in places])
        return tuple(ShardFile(part, rank, file.path, file.finish(), file.nbytes) for rank, file in enumerate(files))


def read_shard(path: Path, sha256: str | None = None) -> dict[str, NDArray[Any]]:
    """The weights of a rank by slot, in the order of the slots, as `ml_dtypes.bfloat16`.

    Raises:
        CheckpointError: the file is damaged or cannot be read. IntegrityError: it has another digest than `sha256`.
    """
    if sha256 is not None:
        with path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != sha256:
            raise IntegrityError(f"{path} has the sha256 {found}, expected is {sha256}; shard the checkpoint again")
    return {name: read_tensor(ref) for name, ref in read_header(path).items()}


class _PartialFile:
    """A file that is hashed while it is written and gets its name at `finish`; left earlier, it is removed."""

    def __init__(self, path: Path) -> None:
        self.path, self.nbytes = path, 0
        self._partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        self._digest = hashlib.sha256()

    def __enter__(self) -> _PartialFile:
        with _told(self._partial):
            self._stream = self._partial.open("wb", buffering=0)
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()
        self._partial.unlink(missing_ok=True)

    def write(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        self._digest.update(view)
        self.nbytes += len(view)
        with _told(self._partial):
            while view:
                view = view[self._stream.write(view) :]

    def finish(self) -> str:
        """Put the file on the disk under its name; returns its sha256."""
        with _told(self.path):
            rename_durably(self._stream, self._partial, self.path)
        return self._digest.hexdigest()


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ResourceError(
            f"{path} cannot be written: {error.strerror}; free space, or choose another folder"
        ) from error


class _Spreader:
    """Reads tensors block by block and gives every rank its rows and columns; buffers are kept between tensors."""

    def __init__(self, stack: ExitStack, files: Sequence[_PartialFile]) -> None:
        import numpy as np

        self._stack, self._files = stack, files
        self._sources: dict[Path, FileIO] = {}
        self._read = np.empty(_BLOCK_BYTES, np.uint8)
        self._copy = np.empty(_BLOCK_BYTES, np.uint8)

    def __call__(self, ref: TensorRef, windows: Sequence[Window]) -> None:
        """Append each rank's window of a tensor to its file."""
        if ref.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{ref.name} in {ref.file} has the dtype {ref.dtype}, shards are made of {', '.join(FLOAT_DTYPES)}; "
                "convert the checkpoint to BF16"
            )
        inner = math.prod(ref.shape[2:])
        columns = [tuple(inner * bound for bound in window.columns) for window in windows]
        first = min(start for start, _ in columns)
        last = max(stop for _, stop in columns)
        top = min(window.rows[0] for window in windows)
        bottom = max(window.rows[1] for window in windows)
        height = max(1, _BLOCK_BYTES // (max(1, last - first) * max(ITEM_BYTES[ref.dtype], 2)))
        for start in range(top, bottom, height):
            stop = min(start + height, bottom)
            block = self._block(ref, start, stop, first, last)
            for file, window, (left, right) in zip(self._files, windows, columns, strict=True):
                rows = block[max(window.rows[0] - start, 0) : max(window.rows[1] - start, 0)]
                self._append(file, rows[:, left - first : right - first], _row_items(window))
        for file, window in zip(self._files, windows, strict=True):
            height = window.shape[0] if window.shape else 1
            missing = 2 * (height - (window.rows[1] - window.rows[0])) * _row_items(window)
            self._zeros(file, missing)

    def _append(self, file: _PartialFile, rows: NDArray[Any], width: int) -> None:
        """Write rows, with zeros behind each up to `width` items."""
        import numpy as np

        if not rows.shape[0]:
            return
        if rows.shape[1] == width and rows.flags.c_contiguous:
            data = rows
        else:
            needed = 2 * rows.shape[0] * width
            if needed > self._copy.nbytes:
                self._copy = np.empty(needed, np.uint8)
            data = self._copy[:needed].view(np.uint16).reshape(rows.shape[0], width)
            data[:, : rows.shape[1]] = rows
            data[:, rows.shape[1] :] = 0
        file.write(data)

    def _zeros(self, file: _PartialFile, nbytes: int) -> None:
        while nbytes > 0:
            self._copy[:] = 0
            file.write(self._copy[:nbytes])
            nbytes -= self._copy.nbytes

    def _block(self, ref: TensorRef, start: int, stop: int, first: int, last: int) -> NDArray[np.uint16]:
        """Rows and columns of a tensor as bfloat16 bits; nothing else of it is read."""
        import ml_dtypes
        import numpy as np

        rows, width, item = stop - start, last - first, ITEM_BYTES[ref.dtype]
        if ref.change:
            values = read_rows(ref, start, stop).reshape(rows, -1)[:, first:last]
            return values.astype(ml_dtypes.bfloat16, copy=False).view(np.uint16)
        if rows * width * item > self._read.nbytes:
            self._read = np.empty(rows * width * item, np.uint8)
        raw = self._read[: rows * width * item]
        row_items = math.prod(ref.shape[1:])
        offset = ref.offset + (start * row_items + first) * item
        if width == row_items:
            self._fill(ref, raw, offset)
        else:
            for row, place in enumerate(raw.reshape(rows, -1)):
                self._fill(ref, place, offset + row * row_items * item)
        if ref.dtype == "BF16":
            return raw.view(np.uint16).reshape(rows, width)
        values = raw.view(np.float16 if ref.dtype == "F16" else np.float32)
        return values.astype(ml_dtypes.bfloat16).view(np.uint16).reshape(rows, width)

    def _fill(self, ref: TensorRef, place: NDArray[np.uint8], offset: int) -> None:
        try:
            if ref.file not in self._sources:
                self._sources[ref.file] = self._stack.enter_context(ref.file.open("rb", buffering=0))
            self._sources[ref.file].seek(offset)
            read_into(self._sources[ref.file], place.data, ref)
        except OSError as error:
            raise CheckpointError(f"{ref.file} cannot be read: {error.strerror}; fetch it again") from error


def _row_items(window: Window) -> int:
    return math.prod(window.shape[1:])
