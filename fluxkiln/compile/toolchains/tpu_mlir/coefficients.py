"""The map from a mould's bytes back to the weights, learned by comparing bytes.

Probe weights are random, so a stored range can only match the form of the weight it was made from. What matches none,
but is the same in a second compile with other probe weights, is a constant of the graph and goes into the map as it is.
A mould with one range that is neither is refused, and its parts are compiled one by one.
"""

from __future__ import annotations

import base64
import bz2
import hashlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from fluxkiln.compile.toolchains.tpu_mlir.bmodel import BmodelNet, read_bmodel
from fluxkiln.compile.toolchains.tpu_mlir.forms import (
    Form,
    FormMaker,
    SlotRows,
    candidates,
    form_bytes,
    integer_candidates,
    whole_rows,
)
from fluxkiln.errors import CompileError
from fluxkiln.types import TRANSPOSED, TensorSpec, WeightReader

_ALIGNMENT = 4096
# of all constants of a kind, compressed: tables and masks shrink, a weight that was taken for one would not
_MAX_CONSTANT_BYTES = 1 << 20
# and as they stand, which a few bytes could stand for
_MAX_UNPACKED_BYTES = 256 << 20
HEAD_BYTES = 4096
# of forms, where they are not as in this one
_SAID, _PLAIN = ("factor", "shift", "weight"), Form("", "")
_NOT_CASTABLE = "so nothing can be cast into it; its parts are compiled one by one"


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one form goes: byte `offset` of the coefficient region, or an array called `array` in the weight file.

    `dtype` (as numpy writes it, `<u2`) and `shape` are the array's.
    """

    form: Form
    offset: int = 0
    array: str = ""
    dtype: str = ""
    shape: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        form = self.form
        value: dict[str, Any] = {"slot": form.slot, "form": form.name}
        if form.chunks > 1:
            value |= {"chunk": form.chunk, "chunks": form.chunks, "axis": form.axis}
        value |= {name: getattr(form, name) for name in _SAID if getattr(form, name) != getattr(_PLAIN, name)}
        if self.array:
            return value | {"array": self.array, "dtype": self.dtype, "shape": list(self.shape)}
        return value | {"offset": self.offset}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Placement:
        rest = dict(value)
        slices = {name: rest.pop(name) for name in ("chunk", "chunks", "axis", *_SAID) if name in rest}
        form, shape = Form(rest.pop("slot"), rest.pop("form"), **slices), tuple(rest.pop("shape", ()))
        return Placement(form, shape=shape, **rest)


@dataclass(frozen=True, slots=True)
class CoefficientMap:
    """Which bytes of a mould come from which slot: with a shell, all that casting needs.

    Attributes:
        binary: covers the coefficient region of the bmodel; in order of offsets.
        interpreter: the arrays of the weight file that the compiler's own interpreter reads beside `*_tpu.mlir`.
        group_size, bits: of the scheme's codes; 0 when it does not quantize.
        size: bytes of the coefficient region.
        shapes: slot -> shape in torch's layout, of the slots that have placements.
        constants: key -> bytes, which forms called `constant` name as their slot.
    """

    binary: tuple[Placement, ...]
    interpreter: tuple[Placement, ...]
    group_size: int
    bits: int
    size: int
    shapes: Mapping[str, tuple[int, ...]]
    constants: Mapping[str, bytes] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "binary": [placement.to_json() for placement in self.binary],
            "interpreter": [placement.to_json() for placement in self.interpreter],
            "group_size": self.group_size,
            "bits": self.bits,
            "size": self.size,
            "shapes": {slot: list(shape) for slot, shape in self.shapes.items()},
            "constants": {key: base64.b64encode(bz2.compress(data)).decode() for key, data in self.constants.items()},
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> CoefficientMap:
        """What `to_json` was made of. Raises AttributeError, KeyError, TypeError, ValueError: it is no such thing."""
        return CoefficientMap(
            tuple(map(Placement.from_json, value["binary"])),
            tuple(map(Placement.from_json, value["interpreter"])),
            int(value["group_size"]),
            int(value["bits"]),
            int(value["size"]),
            {slot: tuple(shape) for slot, shape in value["shapes"].items()},
            _unpack(value["constants"]),
        )


def _unpack(constants: Mapping[str, str]) -> dict[str, bytes]:
    found, left = {}, _MAX_UNPACKED_BYTES
    for key, data in constants.items():
        stream = bz2.BZ2Decompressor()
        try:
            found[key] = stream.decompress(base64.b64decode(data), left)
        except OSError as error:
            raise ValueError(f"the constant {key} cannot be unpacked") from error
        left -= len(found[key])
        if not stream.eof:
            raise ValueError(f"its constants have more than {_MAX_UNPACKED_BYTES} bytes, or are cut short")
    return found


@dataclass(frozen=True, slots=True)
class Probe:
    """A kind compiled with random weights: the bmodel, the arrays of its lowered weight file, what went in."""

    bmodel: Path
    arrays: Mapping[str, NDArray[Any]]
    read_weight: WeightReader


def probe_weight(spec: TensorSpec, seed: int = 0) -> NDArray[Any]:
    """Random bfloat16 weights for one slot in torch's layout, so that each stored range has one origin.

    Vectors lie around 1 (norm weights of 0 or 1 would be folded away), matrices have fan-in variance.
    """
    shape = spec.shape[::-1] if spec.name.endswith(TRANSPOSED) else spec.shape
    key = int.from_bytes(hashlib.sha256(f"{seed}/{spec.name}".encode()).digest()[:8], "little")
    values = np.random.Generator(np.random.SFC64(key)).standard_normal(shape, np.float32)
    if len(shape) == 1:
        values *= np.float32(0.1)
        values += 1
    else:
        values /= np.float32(np.sqrt(np.prod(shape[1:])))
    return values.astype(ml_dtypes.bfloat16)


def probe_reader(slots: Sequence[TensorSpec], seed: int = 0) -> WeightReader:
    """slot -> its probe weight, made anew each time: no two are in memory."""
    specs = {spec.name: spec for spec in slots}
    return lambda slot: probe_weight(specs[slot], seed)


def learn_map(
    bmodel: Path,
    arrays: Mapping[str, NDArray[Any]],
    slots: Sequence[str],
    read_weight: WeightReader,
    group_size: int,
    bits: int,
    again: Callable[[], Probe] | None = None,
    integer: Collection[str] = (),
) -> CoefficientMap:
    """Find the origin of every coefficient range of `bmodel` and of every array the interpreter reads.

    One slot's weight and one of its forms are in memory at a time.

    Args:
        arrays: the compiler's lowered weight file, by name.
        slots, read_weight: the probe weights the mould was compiled with.
        group_size, bits: of the scheme; 0 when it does not quantize.
        again: compiles once more with probe weights of another seed, when a range matches no weight. The map is then
            verified against that compile as well.
        integer: the slots that are stored in integers.

    Raises:
        CompileError: a range matches no weight, or two, and is no constant either.
    """
    (net,) = read_bmodel(bmodel).nets
    stored = [*_ranges(bmodel, net), *_named(arrays)]
    by_size: dict[int, list[_Stored]] = defaultdict(list)
    for one in stored:
        by_size[one.size].append(one)
    shapes = {}
    maker = FormMaker(group_size, bits)
    scales = {slot: maker.row_scales(slot, whole_rows(read_weight(slot))) for slot in integer}
    for slot in slots:
        weight = read_weight(slot)
        shapes[slot], rows = weight.shape, whole_rows(weight)
        integers = integer_candidates(slot, weight.shape, scales)
        for form in (*candidates(slot, weight.shape, group_size), *integers):
            size = form_bytes(form, weight.shape, group_size, bits)
            padded = size + -size % _ALIGNMENT
            for one in _matching(form, [*by_size.get(size, ()), *by_size.get(padded, ())], maker, rows):
                _claim(one, form, size)
    constants = {}
    if strange := next((one for one in stored if one.form is None), None):
        if again is None:
            raise CompileError(
                f"mould {net.name}: {strange.what} of its weights match no probe weight, {_NOT_CASTABLE}"
            )
        other = again()
        (second,) = read_bmodel(other.bmodel).nets
        twins = {(one.offset, one.array): one for one in (*_ranges(other.bmodel, second), *_named(other.arrays))}
        constants = _constants(net, stored, twins)
        maker = FormMaker(group_size, bits, rows_of=lambda slot: whole_rows(other.read_weight(slot)))
        _verify(net, stored, twins, maker, other.read_weight)
    for one in stored:
        if one.rival:
            raise CompileError(
                f"mould {net.name}: {one.what} of its weights match slots {one.found.slot} and {one.rival}; compile it "
                "with probe weights of another seed"
            )
    placements = [Placement(one.found, one.offset, one.array, one.dtype, one.shape) for one in stored]
    return CoefficientMap(
        tuple(placement for placement in placements if not placement.array),
        tuple(placement for placement in placements if placement.array),
        group_size,
        bits,
        net.coefficients.size,
        {slot: shapes[slot] for slot in dict.fromkeys(one.found.slot for one in stored) if slot in shapes},
        constants,
    )


@dataclass(slots=True, eq=False)
class _Stored:
    """Stored bytes in search of their origin; read when they are compared, but for the `head`. `what` names them."""

    what: str
    size: int
    head: NDArray[np.uint8]
    read: Callable[[], NDArray[np.uint8]]
    offset: int = 0
    array: str = ""
    dtype: str = ""
    shape: tuple[int, ...] = ()
    form: Form | None = None
    form_size: int = 0
    rival: str = ""

    @property
    def found(self) -> Form:
        assert self.form is not None
        return self.form


def _ranges(bmodel: Path, net: BmodelNet) -> Iterator[_Stored]:
    covered = 0
    for entry in sorted(net.entries, key=lambda entry: entry.start):
        if entry.start != covered:
            raise CompileError(f"mould {net.name}: its list of weights leaves out bytes from {covered:#x}")
        covered = entry.stop
        start, size = net.coefficients.start + entry.start, entry.size
        head, read = _read(bmodel, start, min(size, HEAD_BYTES)), partial(_read, bmodel, start, size)
        yield _Stored(f"{size} bytes at {entry.start:#x}", size, head, read, offset=entry.start)
    if covered != net.coefficients.size:
        raise CompileError(f"mould {net.name}: its list of weights ends before their region does")


def _named(arrays: Mapping[str, NDArray[Any]]) -> Iterator[_Stored]:
    for name in arrays:
        array = arrays[name]
        head, read = _as_bytes(array)[:HEAD_BYTES].copy(), partial(_read_array, arrays, name)
        what, dtype = f"interpreter array {name}", array.dtype.str
        yield _Stored(what, array.nbytes, head, read, array=name, dtype=dtype, shape=array.shape)


def _read(path: Path, start: int, size: int) -> NDArray[np.uint8]:
    return np.fromfile(path, np.uint8, size, offset=start)


def _read_array(arrays: Mapping[str, NDArray[Any]], name: str) -> NDArray[np.uint8]:
    return _as_bytes(arrays[name])


def _as_bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _matching(form: Form, places: list[_Stored], maker: FormMaker, rows: SlotRows) -> Iterable[_Stored]:
    """Those of the places that hold the form, up to padding."""
    places = list(dict.fromkeys(places))
    data: dict[_Stored, NDArray[np.uint8]] = {}
    position = 0
    blocks = maker.blocks(form, rows) if places else iter(())
    try:
        for block in blocks:
            made = _as_bytes(block)
            if not position:
                places = [one for one in places if np.array_equal(one.head[: made.size], made[:HEAD_BYTES])]
                data = {one: one.read() for one in places}
            places = [one for one in places if np.array_equal(data[one][position : position + made.size], made)]
            position += made.size
            if not places:
                break
    except ValueError:  # this slice has no such form
        return ()
    return [one for one in places if not data[one][position:].any()]


def _claim(one: _Stored, form: Form, size: int) -> None:
    """The longest form wins, then the one with fewest cuts, then the first."""
    if one.form is None or (size, -form.chunks) > (one.form_size, -one.form.chunks):
        one.form, one.form_size, one.rival = form, size, ""
    elif (size, -form.chunks) == (one.form_size, -one.form.chunks) and form.slot != one.form.slot:
        one.rival = form.slot


def _constants(net: BmodelNet, stored: list[_Stored], twins: Mapping[tuple[int, str], _Stored]) -> dict[str, bytes]:
    """Make what matches no weight and is equal in a second compile constants.

    Raises:
        CompileError: a range is not equal in it, or they are too large to be constants.
    """
    constants: dict[str, bytes] = {}
    for one in stored:
        if one.form is not None:
            continue
        twin, data = twins.get((one.offset, one.array)), one.read()
        if twin is None or not np.array_equal(twin.read(), data):
            raise CompileError(
                f"mould {net.name}: {one.what} of its weights match no probe weight, but change with them, "
                f"{_NOT_CASTABLE}"
            )
        kept = data.tobytes() if one.array else data.tobytes().rstrip(b"\0")
        key = hashlib.sha256(kept).hexdigest()[:16]
        constants[key], one.form = kept, Form(key, "constant")
    total = sum(len(bz2.compress(data)) for data in constants.values())
    if total > _MAX_CONSTANT_BYTES:
        raise CompileError(
            f"mould {net.name}: {total} bytes of its weights, compressed, are equal for all probe weights, more than "
            f"{_MAX_CONSTANT_BYTES} are no constants, {_NOT_CASTABLE}"
        )
    return constants


def _verify(
    net: BmodelNet,
    stored: list[_Stored],
    twins: Mapping[tuple[int, str], _Stored],
    maker: FormMaker,
    read_weight: WeightReader,
) -> None:
    """Raise CompileError unless the second compile holds other weights, and where the map says."""
    changed = False
    slot, weight = "", np.empty(0)
    for one in sorted(stored, key=lambda one: (one.found.slot, one.found.name)):  # codes before what they bring along
        if one.found.name == "constant":
            continue
        if one.found.slot != slot:
            slot, weight = one.found.slot, read_weight(one.found.slot)
        made = maker.make(one.found, whole_rows(weight))
        twin = twins[one.offset, one.array].read()
        if not np.array_equal(twin[: made.size], made) or twin[made.size :].any():
            raise CompileError(
                f"mould {net.name}: {one.what} of its weights match {slot} in one compile and not in another, "
                f"{_NOT_CASTABLE}"
            )
        changed = changed or not np.array_equal(twin, one.read())
    if not changed:
        raise CompileError(f"mould {net.name}: compiled twice with the same probe weights; give them two seeds")
