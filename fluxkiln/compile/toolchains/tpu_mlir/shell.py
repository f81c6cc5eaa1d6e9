"""Shells: bmodels without their weights, combined by `model_tool` in seconds, and weights laid out behind them.

`model_tool --combine` holds every file in memory, twice. A shell keeps a net's instructions and its list of
coefficients, and has one page in place of the coefficients themselves. Shells of any number of parts are combined in
little memory, and behind the result regions for the coefficients are laid out: it equals what combining the whole files
gives, apart from where in the file the coefficients lie.
"""

from __future__ import annotations

import hashlib
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fluxkiln.artifacts.actions import Action, ActionCache, run_action
from fluxkiln.artifacts.code import code_version
from fluxkiln.compile.plan import Binary, Plan
from fluxkiln.compile.toolchains.tpu_mlir.bmodel import (
    HEADER,
    HEADER_BYTES,
    MAGIC,
    BmodelNet,
    Span,
    Table,
    find_bmodel_net,
    normalise_time,
    read_bmodel,
    root_table,
)
from fluxkiln.compile.toolchains.tpu_mlir.compiler import combine, require_compiler
from fluxkiln.compile.toolchains.tpu_mlir.devices import find_owners
from fluxkiln.compile.toolchains.tpu_mlir.environment import TPU_MLIR_VERSION
from fluxkiln.errors import CompileError, IntegrityError

PAGE = 4096
_BINARY = struct.Struct("<QQ")  # start, size
_BLOCK = 1 << 20


def make_shell(bmodel: Path, net: str, target: Path, owner: str = "") -> None:
    """Write the shell of a single-net bmodel: its net called `net`, a page of that name's own for its coefficients.

    Args:
        bmodel: as the compiler wrote it, or a shell, which gets another name.
        net: any name.
        owner: the net whose page it is instead, as it has the same coefficients: combined they are stored once.

    Raises:
        CompileError: several nets, or bytes in the file whose purpose is unknown.
        IntegrityError: `bmodel` is damaged.
    """
    model = read_bmodel(bmodel)
    if len(model.nets) != 1:
        raise CompileError(f"{bmodel} has {len(model.nets)} nets; a shell is made of one, before parts are combined")
    (old,) = model.nets
    with bmodel.open("rb") as file:
        head = bytearray(file.read(HEADER_BYTES))
        buffer = bytearray(file.read(model.binary.start - HEADER_BYTES))
    _rename(buffer, old, net)
    buffer += b"\0" * (-(HEADER_BYTES + len(buffer)) % PAGE)
    page = placeholder(owner or net)
    fields = sorted(set(_binary_fields(root_table(bytes(buffer)))))  # tables may be shared
    spans = {place: Span(*_BINARY.unpack_from(buffer, place)) for place in fields}
    weights = spans[old.coefficients_field - HEADER_BYTES]
    starts: dict[Span, int] = {}
    position = 0
    for span in _in_order(bmodel, spans.values(), model.binary.size):
        starts[span] = position
        position += PAGE if span == weights else span.size + -span.size % PAGE
    for place, span in spans.items():
        if span.size:
            _BINARY.pack_into(buffer, place, starts[span], PAGE if span == weights else span.size)
    code = old.check_code.start - HEADER_BYTES
    buffer[code : code + old.check_code.size] = hashlib.sha256(page).digest()
    HEADER.pack_into(head, 0, MAGIC, HEADER_BYTES, len(buffer), position)
    with bmodel.open("rb") as source, target.open("wb") as file:
        file.write(head + buffer)
        base = file.tell()
        for span, start in starts.items():
            file.seek(base + start)
            if span == weights:
                file.write(page)
            else:
                source.seek(model.binary.start + span.start)
                file.write(source.read(span.size))
        file.truncate(base + position)
    normalise_time(target)


def placeholder(net: str) -> bytes:
    """The page that stands for a net's coefficients: equal ones would be merged, so each name has its own."""
    return b"".join(hashlib.sha256(f"{net}/{index}".encode()).digest() for index in range(PAGE // 32))


def lay_out(combined: Path, sizes: Mapping[str, int], target: Path) -> dict[str, Span]:
    """Write `target`: combined shells, and behind them a page-aligned region for each net's coefficients. Nets that
    share a page in the combined shells share a region.

    The file has its full length, but no disk blocks for the regions until they are written. Check codes are still the
    placeholders': write each net's with `write_check_code`.

    Args:
        sizes: net -> bytes of its coefficients.

    Returns:
        Net -> its region of `target`, in absolute positions.

    Raises:
        CompileError: the nets are not those of `sizes`, or a net's coefficients do not fit its size.
    """
    model = read_bmodel(combined)
    names = [net.name for net in model.nets]
    if sorted(names) != sorted(sizes):
        raise CompileError(f"{combined} has the nets {', '.join(names)}, sizes are given for {', '.join(sizes)}")
    regions: dict[str, Span] = {}
    shared: dict[Span, Span] = {}
    position = model.binary.stop
    for net in model.nets:
        listed = max((entry.stop for entry in net.entries), default=0)
        if listed != sizes[net.name]:
            raise CompileError(
                f"net {net.name} lists {listed} bytes of coefficients, its region would have {sizes[net.name]}; "
                "lay it out with the size of the bmodel its shell was made of"
            )
        if net.coefficients not in shared:
            position += -position % PAGE
            shared[net.coefficients] = Span(position, sizes[net.name])
            position += sizes[net.name]
        regions[net.name] = shared[net.coefficients]
        if regions[net.name].size != sizes[net.name]:
            raise CompileError(f"net {net.name} shares its weights with one that has others; forget their moulds")
    shutil.copyfile(combined, target)
    with target.open("r+b") as file:
        file.truncate(position)
        for net in model.nets:
            region = regions[net.name]
            file.seek(net.coefficients.start)
            file.write(bytes(net.coefficients.size))  # nothing leads to the placeholder any more
            file.seek(net.coefficients_field)
            file.write(_BINARY.pack(region.start - model.binary.start, region.size))
        file.seek(0)
        _, header_size, flatbuffer_size, _ = HEADER.unpack(file.read(HEADER.size))
        file.seek(0)
        file.write(HEADER.pack(MAGIC, header_size, flatbuffer_size, position - model.binary.start))
    return regions


def combine_shells(plan: Plan, cache: ActionCache, name: str, binaries: list[Binary]) -> Path:
    """One bmodel with every part's net in order, each with a page in place of its weights."""

    def produce(folder: Path) -> tuple[dict[str, Path], dict[str, Any]]:
        env = require_compiler(f"the combined shell of {name}")
        shells, owners = [], find_owners(binaries)
        for binary in binaries:
            shells.append(folder / f"{binary.net}.bmodel")
            make_shell(cache.path(binary.blobs["shell"]), binary.net, shells[-1], owners[binary.net])
        target = folder / "combined" / name
        target.parent.mkdir()
        combine(env, plan.target.chip, shells, target, plan.logs / f"{name}.log")
        return {"shell": target}, {}

    return cache.path(run_action(cache, combine_action(plan, name, binaries), produce).outputs["shell"])


def combine_action(plan: Plan, name: str, binaries: list[Binary]) -> Action:
    """The key of a combined shell: its nets in order. No checkpoint is in it where all of them are cast."""
    return Action(
        stage="combine",
        what=f"shell of {name}",
        code_version=code_version(combine_shells),
        inputs={binary.net: binary.blobs["shell"].digest for binary in binaries},
        settings={
            "chip": plan.target.chip,
            "order": [binary.net for binary in binaries],
            "shared": {net: owner for net, owner in find_owners(binaries).items() if net != owner},
        },
        tools={"tpu_mlir": TPU_MLIR_VERSION},
    )


def copy_region(bmodel: Path, target: Path, region: Span) -> bytes:
    """Copy the coefficients of a single-net bmodel to their region of a combined file; returns their check code.

    Raises:
        CompileError: they have another size. IntegrityError: they do not have the check code stored beside them.
    """
    (net,) = read_bmodel(bmodel).nets
    if net.coefficients.size != region.size:
        raise CompileError(f"{bmodel} has {net.coefficients.size} bytes of coefficients, the region {region.size}")
    with bmodel.open("rb") as source:
        source.seek(net.check_code.start)
        code = source.read(net.check_code.size)
    if copy_bytes(bmodel, net.coefficients.start, target, region) != code:
        raise IntegrityError(f"{bmodel}: the weights of net {net.name} do not have their check code; compile it again")
    return code


def copy_bytes(source: Path, start: int, target: Path, region: Span) -> bytes:
    """Copy bytes from `start` of a file to their region of another; their sha256."""
    digest = hashlib.sha256()
    with source.open("rb", buffering=0) as file, target.open("r+b", buffering=0) as copy:
        file.seek(start)
        copy.seek(region.start)
        for done in range(0, region.size, _BLOCK):
            block = file.read(min(_BLOCK, region.size - done))
            digest.update(block)
            copy.write(block)
    return digest.digest()


def write_check_code(target: Path, net: str, code: bytes) -> None:
    """Write the sha256 of a net's coefficients, by which the runtime tells whether nets share them."""
    span = find_bmodel_net(target, net).check_code
    if span.size != len(code):
        raise CompileError(f"the check code of net {net} has {span.size} bytes in {target}, {len(code)} are given")
    with target.open("r+b", buffering=0) as file:
        file.seek(span.start)
        file.write(code)


def _rename(buffer: bytearray, net: BmodelNet, name: str) -> None:
    """Another name over the old one if it is as long, else as a new string at the end, to which the field is led."""
    text = name.encode()
    if len(text) == net.name_span.size:
        start = net.name_span.start - HEADER_BYTES
        buffer[start : start + len(text)] = text
        return
    root = root_table(bytes(buffer))
    (table,) = root.tables(_NETS)
    place = table.field(_NET_NAME)
    buffer += b"\0" * (-len(buffer) % 4)
    struct.pack_into("<I", buffer, place, len(buffer) - place)
    buffer += struct.pack("<I", len(text)) + text + b"\0"


@dataclass(frozen=True, slots=True)
class _Fields:
    """Where a flatbuffer table holds ranges of the binary area: fields by number.

    `own`: `Binary` structs; `lists`: vectors of them; `one` and `many`: tables and vectors of tables that have some.
    """

    own: tuple[int, ...] = ()
    lists: tuple[int, ...] = ()
    one: Mapping[int, _Fields] = field(default_factory=dict)
    many: Mapping[int, _Fields] = field(default_factory=dict)


_NETS, _NET_NAME = 4, 0
_COMMANDS = _Fields(own=(2, 3))
_CORE_COMMANDS = _Fields(lists=(1, 2, 3), many={0: _COMMANDS})
_CPU_PARAMETER = _Fields(own=(1,), many={2: _Fields(own=(1,))})
_SUBNET = _Fields(many={1: _COMMANDS, 2: _CPU_PARAMETER, 14: _CORE_COMMANDS})
_PARAMETER = _Fields(own=(9, 11, 15, 19), one={4: _Fields(own=(2,))}, many={8: _COMMANDS, 12: _SUBNET})
_MODULE = _Fields(own=(1,))
_MODEL = _Fields(own=(10,), one={6: _MODULE, 8: _MODULE}, many={_NETS: _Fields(many={3: _PARAMETER})})


def _binary_fields(table: Table, fields: _Fields = _MODEL) -> Iterator[int]:
    """Positions in the flatbuffer of every `Binary {start, size}`."""
    for number in fields.own:
        if place := table.field(number):
            yield place
    for number in fields.lists:
        items = table.vector(number, _BINARY.size)
        yield from range(items.start, items.stop, _BINARY.size)
    for number, inner in fields.one.items():
        if (child := table.table(number)) is not None:
            yield from _binary_fields(child, inner)
    for number, inner in fields.many.items():
        for child in table.tables(number):
            yield from _binary_fields(child, inner)


def _in_order(path: Path, spans: Iterable[Span], size: int) -> list[Span]:
    """The ranges of a binary area, each once; they must cover it, or something would be left behind."""
    ordered = sorted({span for span in spans if span.size}, key=lambda span: span.start)
    end = 0
    for span in (*ordered, Span(size, 0)):
        if not 0 <= span.start - end < PAGE:
            raise CompileError(
                f"{path}: the bytes {end:#x} to {span.start:#x} of its binary area are of unknown use, so it has no "
                "shell; pin TPU-MLIR 1.30.2"
            )
        end = span.stop
    return ordered
