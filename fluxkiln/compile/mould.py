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


def probe_weights(slots: Sequence[TensorSpec], seed: int = 0) -> dict[str, NDArray[Any]]:
    """Random bfloat16 weights for every slot in torch's layout, so that each stored range has one origin.

    Vectors lie around 1 (norm weights of 0 or 1 would be folded away), matrices have fan-in variance.
    """
    weights = {}
    for spec in slots:
        shape = spec.shape[::-1] if spec.name.endswith(TRANSPOSED) else spec.shape
        key = int.from_bytes(hashlib.sha256(f"{seed}/{spec.name}".encode()).digest()[:8], "little")
        values = np.random.Generator(np.random.SFC64(key)).standard_normal(shape, np.float32)
        if len(shape) == 1:
            values = 1 + 0.1 * values
        else:
            values /= np.float32(np.sqrt(np.prod(shape[1:])))
        weights[spec.name] = values.astype(ml_dtypes.bfloat16)
    return weights


def learn_map(
    bmodel: Path,
    arrays: Mapping[str, NDArray[Any]],
    weights: Mapping[str, NDArray[Any]],
    group_size: int,
    bits: int,
) -> CoefficientMap:
    """Find the origin of every coefficient range of `bmodel` and of every array the interpreter reads.

    Args:
        arrays: the compiler's lowered weight file, by name.
        weights: the probe weights the mould was compiled with.
        group_size, bits: of the scheme; 0 when it does not quantize.

    Raises:
        CompileError: a range matches no weight, or more than one.
    """
    index = _Candidates(weights, group_size, bits)
    (net,) = read_bmodel(bmodel).nets
    binary = []
    for (offset, size), stored in _ranges(bmodel, net):
        form = index.find(stored, padded=True)
        if form is None:
            raise CompileError(
                f"mould {net.name}: {size} bytes at {offset:#x} of its weights match no probe weight, so nothing can be "
                "cast into it; its parts are compiled one by one"
            )
        binary.append(Placement(form, offset=offset))
    interpreter = []
    for name, array in arrays.items():
        form = index.find(np.ascontiguousarray(array).view(np.uint8).reshape(-1), padded=False)
        if form is None:
            raise CompileError(f"mould {net.name}: interpreter array {name} matches no probe weight")
        interpreter.append(Placement(form, array=name))
    return CoefficientMap(tuple(binary), tuple(interpreter), group_size, bits)


def _ranges(bmodel: Path, net: Net) -> Iterable[tuple[tuple[int, int], NDArray[np.uint8]]]:
    with bmodel.open("rb") as file:
        covered = 0
        for entry in sorted(net.entries, key=lambda entry: entry.offset):
            if entry.offset != covered:
                raise CompileError(f"mould {net.name}: its list of weights leaves out bytes from {covered:#x}")
            covered = entry.offset + entry.size
            file.seek(net.coefficients.start + entry.offset)
            yield (entry.offset, entry.size), np.frombuffer(file.read(entry.size), np.uint8)
        if covered != net.coefficients.size:
            raise CompileError(f"mould {net.name}: its list of weights ends before their region does")


class _Candidates:
    """Forms of all slots, found by their first bytes."""

    HEAD = 64

    def __init__(self, weights: Mapping[str, NDArray[Any]], group_size: int, bits: int) -> None:
        self.slots = {slot: SlotForms(weight, group_size, bits) for slot, weight in weights.items()}
        self.by_head: dict[bytes, list[Form]] = {}
        for slot, forms in self.slots.items():
            for form in forms.candidates(slot):
                try:
                    made = forms.make(form)
                except ValueError:
                    continue
                head = made.view(np.uint8).reshape(-1)[: self.HEAD].tobytes()
                self.by_head.setdefault(head, []).append(form)

    def find(self, stored: NDArray[np.uint8], padded: bool) -> Form | None:
        """The form whose bytes are `stored`, up to padding with zeros; the longest when several agree."""
        found = []
        for length in (self.HEAD, stored.size):
            for form in self.by_head.get(stored[:length].tobytes(), ()):
                made = self.slots[form.slot].make(form).view(np.uint8).reshape(-1)
                rest = stored[made.size :]
                fits = made.size <= stored.size and (rest.size < ALIGNMENT if padded else rest.size == 0)
                if fits and not rest.any() and np.array_equal(stored[: made.size], made):
                    found.append((made.size, form))
            if found:
                break
        if not found:
            return None
        longest = max(size for size, _ in found)
        return min((form for size, form in found if size == longest), key=lambda form: (form.chunks, form.name))
