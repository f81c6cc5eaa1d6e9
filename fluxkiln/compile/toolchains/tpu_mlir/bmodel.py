"""Reading and patching bmodel files: nets, their coefficient region, check codes, build time.

A bmodel is a 64-byte header, a flatbuffer (`bmodel.fbs` of TPU-MLIR) and a binary area; offsets in the flatbuffer count
from the start of the binary area. Field numbers below are the `id`s of that schema.

Source: TPU-MLIR 1.30.2, include/tpu_mlir/Builder/BM168x/bmodel.fbs and bmodel.hpp.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxkiln.errors import CompileError, IntegrityError

MAGIC = 0xFF55AAEE
HEADER = struct.Struct("<IIIQ")  # magic, header size, flatbuffer size, binary size
HEADER_BYTES = 64
# of the flatbuffer; instructions and weights are not in it, and a net takes 4 KB of it
MAX_TABLE_BYTES = 16 << 20
# One part of it may stand for several things, but not for all that a program could be made to read.
_MOST_READ = 4
# Model.time is what asctime writes; every bmodel we keep carries this one, so that equal inputs give equal files
CANONICAL_TIME = b"Thu Jan  1 00:00:00 1970\n"

_MODEL = {"time": 2, "chip": 3, "net": 4, "neuron_size": 5}
_NET = {"name": 0, "parameter": 3}
_PARAMETER = {"input": 0, "output": 1, "ctx_size": 3, "coeff": 4, "cmd_group": 8, "sub_net": 12, "io_size": 18}
_COEFF = {"check_code": 1, "binary": 2, "location": 3}
_LOCATION = {"offset": 1, "size": 2}
_TENSOR = {"name": 0, "data_type": 1, "size": 4, "shape": 5}
_CMD_GROUP = {"binary_bdc": 2, "binary_gdma": 3}
_SUBNET = {"cmd_group": 1}
DATA_TYPES = ("float32", "float16", "int8", "uint8", "int16", "uint16", "int32", "uint32", "bfloat16", "int4", "uint4")


@dataclass(frozen=True, slots=True)
class Span:
    """A byte range of the file."""

    start: int
    size: int

    @property
    def stop(self) -> int:
        return self.start + self.size


@dataclass(frozen=True, slots=True)
class NetTensor:
    """An input or output of a net, as the runtime sees it."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BmodelNet:
    """One net of a bmodel. Spans are absolute file positions; at `coefficients_field` the file says where those are.

    `entries` are the coefficients' ranges inside their region, each padded to the region's alignment.
    """

    name: str
    name_span: Span
    inputs: tuple[NetTensor, ...]
    outputs: tuple[NetTensor, ...]
    coefficients: Span
    coefficients_field: int
    check_code: Span
    entries: tuple[Span, ...]
    instruction_bytes: int
    runtime_bytes: int


@dataclass(frozen=True, slots=True)
class BModel:
    """What a bmodel file declares. `binary` is its binary area, from whose start the flatbuffer's offsets count."""

    path: Path
    chip: str
    time_span: Span
    nets: tuple[BmodelNet, ...]
    binary: Span


def read_bmodel(path: Path) -> BModel:
    """Parse the header and the flatbuffer, not the weights.

    Raises:
        IntegrityError: the file is no bmodel or is cut short.
    """
    with path.open("rb") as file:
        head = file.read(HEADER_BYTES)
        if len(head) < HEADER_BYTES or HEADER.unpack_from(head)[0] != MAGIC:
            raise IntegrityError(f"{path} is no bmodel: its first four bytes are not {MAGIC:#x}; build it again")
        _, header_size, flatbuffer_size, binary_size = HEADER.unpack_from(head)
        base = header_size + flatbuffer_size
        actual = path.stat().st_size
        if actual < base + binary_size or flatbuffer_size > MAX_TABLE_BYTES:
            raise IntegrityError(
                f"{path} has {actual} bytes, its header promises {base + binary_size}, of which a table of contents of "
                f"{flatbuffer_size} ({MAX_TABLE_BYTES} are the most); build it again"
            )
        file.seek(header_size)
        buffer = file.read(flatbuffer_size)
    try:
        return _parse(path, buffer, header_size, Span(base, binary_size))
    except (struct.error, IndexError, ValueError) as error:
        raise IntegrityError(f"{path} has a damaged table of contents ({error}); build it again") from error


def find_bmodel_net(path: Path, name: str) -> BmodelNet:
    """The net of this name; CompileError when there is none."""
    nets = {net.name: net for net in read_bmodel(path).nets}
    if name not in nets:
        raise CompileError(f"{path} has no net {name!r}; it has {', '.join(nets)}")
    return nets[name]


def hash_span(path: Path, span: Span) -> bytes:
    """sha256 of a byte range, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(span.start)
        left = span.size
        while block := file.read(min(left, 1 << 22)):
            digest.update(block)
            left -= len(block)
    return digest.digest()


def normalise_time(path: Path) -> None:
    """Put the canonical build time into a freshly compiled bmodel."""
    model = read_bmodel(path)
    if model.time_span.size != len(CANONICAL_TIME):
        size = model.time_span.size
        raise IntegrityError(f"{path}: a build time of {size} bytes; {len(CANONICAL_TIME)} are expected")
    with path.open("r+b") as file:
        file.seek(model.time_span.start)
        file.write(CANONICAL_TIME)


def root_table(buffer: bytes) -> Table:
    """The flatbuffer's `Model`."""
    return Table(buffer, struct.unpack_from("<I", buffer, 0)[0], [_MOST_READ * len(buffer)])


def _parse(path: Path, buffer: bytes, shift: int, binary: Span) -> BModel:
    root = root_table(buffer)
    nets = []
    for net in root.tables(_MODEL["net"]):
        for parameter in net.tables(_NET["parameter"]):
            coeff = parameter.table(_PARAMETER["coeff"])
            name, name_span = net.text(_NET["name"])
            start, size = coeff.pair(_COEFF["binary"]) if coeff else (0, 0)
            code = coeff.vector(_COEFF["check_code"], 1) if coeff else Span(0, 0)
            entries = [
                Span(location.scalar(_LOCATION["offset"], "<Q"), location.scalar(_LOCATION["size"], "<Q"))
                for location in (coeff.tables(_COEFF["location"]) if coeff else ())
            ]
            nets.append(
                BmodelNet(
                    name=name,
                    name_span=Span(name_span.start + shift, name_span.size),
                    inputs=tuple(map(_tensor, parameter.tables(_PARAMETER["input"]))),
                    outputs=tuple(map(_tensor, parameter.tables(_PARAMETER["output"]))),
                    coefficients=Span(start + binary.start, size),
                    coefficients_field=coeff.field(_COEFF["binary"]) + shift if coeff else 0,
                    check_code=Span(code.start + shift, code.size),
                    entries=tuple(entries),
                    instruction_bytes=_command_bytes(parameter),
                    runtime_bytes=sum(parameter.scalar(_PARAMETER[name], "<Q") for name in ("ctx_size", "io_size")),
                )
            )
    _, time_span = root.text(_MODEL["time"])
    chip, _ = root.text(_MODEL["chip"])
    return BModel(path, chip.lower(), Span(time_span.start + shift, time_span.size), tuple(nets), binary)


def _tensor(table: Table) -> NetTensor:
    code = table.scalar(_TENSOR["data_type"], "<I")
    shapes = list(table.tables(_TENSOR["shape"]))
    dims = shapes[0].vector(0, 8) if shapes else Span(0, 0)
    shape = struct.unpack_from(f"<{dims.size // 8}Q", table.buffer, dims.start)
    dtype = DATA_TYPES[code] if code < len(DATA_TYPES) else f"type {code}"
    return NetTensor(table.text(_TENSOR["name"])[0], dtype, shape)


def _command_bytes(parameter: Table) -> int:
    # static nets list the same groups twice: once for the net, once for its sub-nets
    subnets = parameter.tables(_PARAMETER["sub_net"])
    groups = [group for subnet in subnets for group in subnet.tables(_SUBNET["cmd_group"])]
    groups = groups or list(parameter.tables(_PARAMETER["cmd_group"]))
    return sum(group.pair(field)[1] for group in groups for field in _CMD_GROUP.values())


class Table:
    """A flatbuffer table: fields by number. Source: https://flatbuffers.dev/internals/.

    `left`: how many bytes of vectors may still be read, of all tables together: those of a forged file may lie in one
    another. ValueError when they are used up.
    """

    def __init__(self, buffer: bytes, position: int, left: list[int]) -> None:
        self.buffer, self.position, self.left = buffer, position, left
        self.vtable = position - struct.unpack_from("<i", buffer, position)[0]
        self.vtable_size = struct.unpack_from("<H", buffer, self.vtable)[0]

    def field(self, number: int) -> int:
        """Absolute position of a field's value, or 0 when it is not stored."""
        slot = 4 + 2 * number
        if slot >= self.vtable_size:
            return 0
        offset = struct.unpack_from("<H", self.buffer, self.vtable + slot)[0]
        return self.position + offset if offset else 0

    def _reference(self, number: int) -> int:
        position = self.field(number)
        return position + struct.unpack_from("<I", self.buffer, position)[0] if position else 0

    def scalar(self, number: int, layout: str) -> int:
        position = self.field(number)
        value: Any = struct.unpack_from(layout, self.buffer, position)[0] if position else 0
        return int(value)

    def pair(self, number: int) -> tuple[int, int]:
        """A `Binary {start, size}` struct, stored in line."""
        position = self.field(number)
        return struct.unpack_from("<QQ", self.buffer, position) if position else (0, 0)

    def table(self, number: int) -> Table | None:
        position = self._reference(number)
        return Table(self.buffer, position, self.left) if position else None

    def vector(self, number: int, item_size: int) -> Span:
        """Position in the buffer and byte size of a vector's items."""
        position = self._reference(number)
        if not position:
            return Span(0, 0)
        found = Span(position + 4, struct.unpack_from("<I", self.buffer, position)[0] * item_size)
        self.left[0] -= found.size
        if found.stop > len(self.buffer) or self.left[0] < 0:
            raise ValueError(f"a list of {found.size} bytes, which are not there or were read too often")
        return found

    def tables(self, number: int) -> Iterator[Table]:
        items = self.vector(number, 4)
        for position in range(items.start, items.stop, 4):
            yield Table(self.buffer, position + struct.unpack_from("<I", self.buffer, position)[0], self.left)

    def text(self, number: int) -> tuple[str, Span]:
        span = self.vector(number, 1)
        return self.buffer[span.start : span.stop].decode(), span
