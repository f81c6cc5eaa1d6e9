"""Moulds: a kind compiled once with random probe weights, and the map from its bytes back to the weights.

Probe weights are random, so a stored range can only match the form of the weight it was made from. The map is learned
by comparing bytes; a mould with one range that matches nothing is refused, and its parts are compiled one by one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from fluxkiln.artifacts.types import TensorSpec
from fluxkiln.compile.bmodel import Net, read_bmodel
from fluxkiln.compile.forms import Form, SlotForms
from fluxkiln.errors import CompileError

# a slot's weight in torch's layout [O, I], and how it is called in the graph
WeightReader = Callable[[str], NDArray[Any]]
TRANSPOSED = "__t"
ALIGNMENT = 4096


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one form goes: byte `offset` of the coefficient region, or an array called `array` in the weight file."""

    form: Form
    offset: int = 0
    array: str = ""


@dataclass(frozen=True, slots=True)
class CoefficientMap:
    """Which bytes of a mould come from which slot.

    `binary` covers the coefficient region of the bmodel, `interpreter` the arrays of the weight file that the
    compiler's own interpreter reads beside `*_tpu.mlir`.
    """

    binary: tuple[Placement, ...]
    interpreter: tuple[Placement, ...]
    group_size: int
    bits: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> CoefficientMap:
        def placements(items: Iterable[Mapping[str, Any]]) -> tuple[Placement, ...]:
            return tuple(Placement(Form(**item["form"]), item["offset"], item["array"]) for item in items)

        return CoefficientMap(
            placements(value["binary"]), placements(value["interpreter"]), int(value["group_size"]), int(value["bits"])
        )


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

    def read(slot: str) -> NDArray[Any]:
        return probe_weight(specs[slot], seed)

    return read


def learn_map(
    bmodel: Path,
    arrays: Mapping[str, NDArray[Any]],
    slots: Sequence[str],
    read_weight: WeightReader,
    group_size: int,
    bits: int,
) -> CoefficientMap:
    """Find the origin of every coefficient range of `bmodel` and of every array the interpreter reads.

    One slot's forms are in memory at a time.

    Args:
        arrays: the compiler's lowered weight file, by name.
        slots, read_weight: the probe weights the mould was compiled with.
        group_size, bits: of the scheme; 0 when it does not quantize.

    Raises:
        CompileError: a range matches no weight.
    """
    (net,) = read_bmodel(bmodel).nets
    ranges = [_Stored(_as_bytes(data), padded=True, offset=offset) for offset, data in _ranges(bmodel, net)]
    named = [_Stored(_as_bytes(array), padded=False, array=name) for name, array in arrays.items()]
    by_head: dict[bytes, list[_Stored]] = {}
    for stored in (*ranges, *named):
        by_head.setdefault(_head(stored.data), []).append(stored)
    for slot in slots:
        forms = SlotForms(read_weight(slot), group_size, bits)
        for form in forms.candidates(slot):
            try:
                made = _as_bytes(forms.make(form))
            except ValueError:  # this slice has no such form
                continue
            for stored in by_head.get(_head(made), ()):
                stored.offer(form, made)
    for stored in (*ranges, *named):
        if stored.form is None:
            where = (
                f"interpreter array {stored.array}"
                if stored.array
                else f"{stored.data.size} bytes at {stored.offset:#x}"
            )
            raise CompileError(
                f"mould {net.name}: {where} of its weights match no probe weight, so nothing can be cast into it; its "
                "parts are compiled one by one"
            )
    return CoefficientMap(
        tuple(Placement(stored.found, offset=stored.offset) for stored in ranges),
        tuple(Placement(stored.found, array=stored.array) for stored in named),
        group_size,
        bits,
    )


HEAD_BYTES = 64


@dataclass(slots=True)
class _Stored:
    """Stored bytes in search of their origin."""

    data: NDArray[np.uint8]
    padded: bool
    offset: int = 0
    array: str = ""
    form: Form | None = None
    size: int = 0

    def offer(self, form: Form, made: NDArray[np.uint8]) -> None:
        """Take `form` if it is what is stored here, up to padding; the longest wins, then the one with fewest cuts."""
        rest = self.data.size - made.size
        if rest < 0 or rest >= (ALIGNMENT if self.padded else 1):
            return
        if not np.array_equal(self.data[: made.size], made) or self.data[made.size :].any():
            return
        if self.form is None or (made.size, -form.chunks) > (self.size, -self.form.chunks):
            self.form, self.size = form, made.size

    @property
    def found(self) -> Form:
        assert self.form is not None
        return self.form


def _as_bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _head(data: NDArray[np.uint8]) -> bytes:
    return data[:HEAD_BYTES].tobytes().ljust(HEAD_BYTES, b"\0")


def _ranges(bmodel: Path, net: Net) -> Iterable[tuple[int, NDArray[np.uint8]]]:
    with bmodel.open("rb") as file:
        covered = 0
        for entry in sorted(net.entries, key=lambda entry: entry.offset):
            if entry.offset != covered:
                raise CompileError(f"mould {net.name}: its list of weights leaves out bytes from {covered:#x}")
            covered = entry.offset + entry.size
            file.seek(net.coefficients.start + entry.offset)
            yield entry.offset, np.frombuffer(file.read(entry.size), np.uint8)
        if covered != net.coefficients.size:
            raise CompileError(f"mould {net.name}: its list of weights ends before their region does")
