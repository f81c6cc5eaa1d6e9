"""A component as a file of others has it: its tensors joined, renamed and packed, a few rows of one at a time.

What a tensor is made of and where its bytes go is known before the first one is read. So rows are read, packed and
written by all cores, in any order, each to its place; memory is that of a few pieces, whatever the size of tensors.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.compile.plan import Plan
from fluxkiln.compile.tensors import stored_forms
from fluxkiln.errors import IntegrityError, SchemeError
from fluxkiln.export.checkpoint import Checkpoint, read_rows
from fluxkiln.export.safetensors_header import ITEM_BYTES
from fluxkiln.files import disk_full_named, reserve
from fluxkiln.patches.model import Joined
from fluxkiln.quantize.formats import FILE_FORMATS
from fluxkiln.types import TensorRef

if TYPE_CHECKING:
    from numpy.typing import NDArray

# of the checkpoint, that are read at once
BYTES_AT_ONCE = 4 << 20


@dataclass(frozen=True, slots=True)
class RowRange:
    """RowRange `start` to `stop` of a tensor of the checkpoint, whose first is row `place` of what is made."""

    ref: TensorRef
    start: int
    stop: int
    place: int


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor of a file that is yet to be written.

    Attributes:
        form: of `quantize.formats`, or F32, F16, BF16.
        rows: of the checkpoint's tensors, in its order.
        kernel: see `Joined`.
    """

    name: str
    shape: tuple[int, ...]
    form: str
    rows: tuple[RowRange, ...]
    kernel: str = ""

    @property
    def row_bytes(self) -> tuple[int, ...]:
        """Bytes of a row in each plane."""
        if self.form in FILE_FORMATS:
            return FILE_FORMATS[self.form].row_bytes(self.shape[1])
        return (math.prod(self.shape[1:]) * ITEM_BYTES[self.form],)

    @property
    def nbytes(self) -> tuple[int, ...]:
        """Bytes of each plane."""
        return tuple(self.shape[0] * size for size in self.row_bytes)


@dataclass(frozen=True, slots=True)
class Placed:
    """A tensor, and where in the file each of its planes begins."""

    tensor: FileTensor
    offsets: tuple[int, ...]


def file_names(checkpoint: Checkpoint, folder: str) -> tuple[Joined, ...]:
    """The tensors of a folder of the checkpoint as the files of its publisher have them: each by itself."""
    names = checkpoint.model.layout(folder, checkpoint.configs[folder])
    return tuple(Joined(name, (state,)) for state, name in checkpoint.model.state_names(folder, names).items())


def plan_tensors(
    checkpoint: Checkpoint, plan: Plan, folder: str, joined: Iterable[Joined], small: Callable[[tuple[int, ...]], str]
) -> tuple[FileTensor, ...]:
    """What a file of the weights in a folder is made of, without reading one.

    Args:
        small: shape -> the form of a tensor that is no matrix, or a small one; empty for that of its scheme.

    Raises:
        SchemeError: tensors that are one in the file are stored in two ways.
    """
    forms, refs, made = stored_forms(checkpoint, plan, folder), checkpoint.tensors[folder], []
    for one in joined:
        sources = [refs[name] for name in one.sources]
        shape = (sum(ref.shape[0] for ref in sources), *_inner_shape(one, sources[0].shape[1:]))
        wanted = dict.fromkeys(forms[name] for name in one.sources)
        form = small(shape) or next(iter(wanted))
        if form in wanted and len(wanted) > 1:
            raise SchemeError(
                f"{', '.join(one.sources)} are one tensor there, {one.name}, and are asked for as "
                f"{' and '.join(wanted)}; name all of them or none"
            )
        made.append(FileTensor(one.name, shape, form, tuple(_rows(sources, one.swapped)), one.kernel))
    return tuple(made)


def _inner_shape(one: Joined, shape: tuple[int, ...]) -> tuple[int, ...]:
    return {"": shape, "OHWI": (*shape[1:], *shape[:1]), "1x1": (*shape, 1, 1)}[one.kernel]


def _rows(sources: Sequence[TensorRef], swapped: bool) -> Iterator[RowRange]:
    place = 0
    for ref in sources:
        height, half = ref.shape[0], ref.shape[0] // 2
        for start, stop in ((half, height), (0, half)) if swapped else ((0, height),):
            yield RowRange(ref, start, stop, place)
            place += stop - start


def write_tensors(path: Path, head: bytes, placed: Sequence[Placed], size: int, count: Callable[[int], None]) -> None:
    """Write a file of `size` bytes: `head`, and every tensor at its place; what is between them is zero.

    Args:
        count: told of bytes of the checkpoint that were read.

    Raises:
        ResourceError: the disk is full. CheckpointError: a weight cannot be read.
    """
    with disk_full_named(path.parent, size), path.open("wb") as file:
        reserve(file, size)
        file.truncate(size)
        file.write(head)
        file.flush()
        with ThreadPoolExecutor(os.cpu_count() or 1, "pack") as threads:
            try:
                for done in threads.map(lambda piece: _write_piece(file.fileno(), *piece), _pieces(placed)):
                    count(done)
            except BaseException:
                threads.shutdown(cancel_futures=True)
                raise


def _pieces(placed: Sequence[Placed]) -> Iterator[tuple[Placed, RowRange]]:
    for one in placed:
        for rows in one.tensor.rows:
            row_bytes = max(1, rows.ref.nbytes // max(1, rows.ref.shape[0]))
            step = max(1, BYTES_AT_ONCE // row_bytes)
            for start in range(rows.start, rows.stop, step):
                stop = min(start + step, rows.stop)
                yield one, RowRange(rows.ref, start, stop, rows.place + start - rows.start)


def _write_piece(fd: int, one: Placed, rows: RowRange) -> int:
    weight = read_rows(rows.ref, rows.start, rows.stop)
    if one.tensor.kernel == "OHWI":
        weight = weight.transpose(0, 2, 3, 1)
    sizes = one.tensor.row_bytes
    for plane, offset, size in zip(pack_rows(weight, one.tensor.form), one.offsets, sizes, strict=True):
        view, at = plane.data.cast("B"), offset + rows.place * size
        while view:
            written = os.pwrite(fd, view, at)
            view, at = view[written:], at + written
    return weight.nbytes


# first row, and the one behind the last -> those rows of a tensor, float32
ReadRows = Callable[[int, int], "NDArray[Any]"]


class FileReader:
    """The tensors of a folder of the checkpoint by its names, float32, from those of its files; see `Joined`.

    Raises:
        IntegrityError: the files lack a tensor.
    """

    def __init__(
        self, checkpoint: Checkpoint, folder: str, joined: Iterable[Joined], tensors: Mapping[str, ReadRows], where: str
    ) -> None:
        self._refs, self._tensors = checkpoint.tensors[folder], tensors
        self._places: dict[str, tuple[Joined, int]] = {}
        for one in joined:
            if one.name not in tensors:
                raise IntegrityError(f"{where} has no tensor {one.name}; build it again")
            start = 0
            for source in one.sources:
                self._places[source] = one, start
                start += self._refs[source].shape[0]

    def __call__(self, name: str) -> NDArray[Any]:
        """A tensor of the checkpoint."""
        import numpy as np

        (one, start), shape = self._places[name], self._refs[name].shape
        rows = self._tensors[one.name](start, start + shape[0])
        if one.kernel == "OHWI":
            rows = rows.transpose(0, 3, 1, 2)
        rows = np.ascontiguousarray(rows).reshape(shape)
        return np.roll(rows, len(rows) // 2, axis=0) if one.swapped else rows


def pack_rows(weight: NDArray[Any], form: str) -> tuple[NDArray[Any], ...]:
    """RowRange of a weight of any float as a file has them."""
    import numpy as np

    from fluxkiln.quantize.pack import to_bf16_bits

    if form in FILE_FORMATS:
        return FILE_FORMATS[form].pack(weight)
    if form == "BF16":
        return (np.ascontiguousarray(to_bf16_bits(weight)),)
    return (np.ascontiguousarray(weight, "<f2" if form == "F16" else "<f4"),)
