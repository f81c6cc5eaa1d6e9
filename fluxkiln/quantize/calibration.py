"""Calibration: what is known of inputs and outputs of weight matrices, the file that it is in, and how it is recorded.

For every input that several matrices may share (the query, key and value of an attention say) there are the tensors
`<key>.peaks` [I] and `<key>.sizes` [I, n] (`quantize.sizes`), and either `<key>.blocks` [n, b, b] or, where b does not
divide I, `<key>.blocks` and `<key>.rest` [r, r]; for every matrix `<name>.outputs` [O], the largest sizes of its
products. The metadata entry `calibration` is JSON: which checkpoint, which prompts, and per matrix its key and count.

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fluxkiln.documents import read_object
from fluxkiln.errors import CheckpointError, IntegrityError, SchemeError
from fluxkiln.quantize.sizes import SIZE_BINS, count_sizes

FORMAT = 2
METADATA = "calibration"
# channels of a block, half of FLUX.1's width: 9 MB. Whole inputs are twice as many bytes for a tenth less error
DEFAULT_BLOCK = 1536


@dataclass(frozen=True, slots=True)
class Statistics:
    """Second moments of the inputs X [N, I] of one matrix, by channel and between neighbours.

    A weight's error E [O, I] makes the squared output error tr(E (X^T X) E^T), of which `blocks` keep all products of
    channels that are near to one another.

    Attributes:
        blocks: float32 [b, b] each, those on the diagonal of X^T X / N; they cover all input channels.
        peaks: mean of |x_i|, float32 [I].
        count: input rows that were seen.
        sizes: how often |x_i| was how large, float32 [I, n], see `quantize.sizes`; None where only moments are known.
    """

    blocks: tuple[NDArray[np.float32], ...]
    peaks: NDArray[np.float32]
    count: int
    sizes: NDArray[np.float32] | None = None

    @property
    def in_features(self) -> int:
        return sum(len(block) for block in self.blocks)

    @property
    def diagonal(self) -> NDArray[np.float32]:
        """Mean of x_i^2, float32 [I]."""
        return np.concatenate([np.diag(block) for block in self.blocks])

    def columns(self, start: int, stop: int) -> Statistics:
        """What is known of some of the channels: for a weight that a part uses in slices."""
        cut = []
        for first, block in self.starts():
            low, high = max(start - first, 0), min(stop - first, len(block))
            if low < high:
                cut.append(block[low:high, low:high])
        sizes = None if self.sizes is None else self.sizes[start:stop]
        return Statistics(tuple(cut), self.peaks[start:stop], self.count, sizes)

    def starts(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Each block with the channel that it begins at."""
        first = 0
        for block in self.blocks:
            yield first, block
            first += len(block)

    def check(self, name: str, in_features: int) -> None:
        """Raise SchemeError unless these are finite moments of inputs of this width."""
        if self.in_features != in_features or self.peaks.shape != (in_features,):
            raise SchemeError(
                f"calibration of {name} is for {self.in_features} input channels, the weight has {in_features}; "
                "calibrate this checkpoint"
            )
        diagonal = self.diagonal
        sound = all(np.isfinite(block).all() for block in self.blocks) and np.isfinite(self.peaks).all()
        if self.sizes is not None:
            sound = sound and self.sizes.shape == (in_features, SIZE_BINS) and np.isfinite(self.sizes).all()
        if not sound or (diagonal < 0).any() or self.count < 1:
            raise SchemeError(
                f"calibration of {name} has NaN, infinite or negative moments; calibrate again, with prompts that the "
                "model runs without overflow"
            )


def output_error(error_OI: NDArray[np.float32], statistics: Statistics) -> float:
    """Sum over output rows and mean over inputs of the squared error that an error of the weight makes: tr(E H E^T)."""
    total = 0.0
    for first, block in statistics.starts():
        part = error_OI[:, first : first + len(block)]
        total += float(np.einsum("ij,ij->", part @ block, part, dtype=np.float64))
    return total


def mean_statistics(known: Sequence[Statistics]) -> Statistics:
    """Of inputs that are one and the same, but may have been recorded one by one."""
    first, *others = known
    if all(one.peaks is first.peaks for one in others):
        return first
    blocks = tuple(np.mean(blocks, axis=0) for blocks in zip(*(one.blocks for one in known), strict=True))
    peaks: NDArray[np.float32] = np.mean([one.peaks for one in known], axis=0)
    sizes = [one.sizes for one in known if one.sizes is not None]
    return Statistics(blocks, peaks, first.count, np.mean(sizes, axis=0) if len(sizes) == len(known) else None)


@dataclass(frozen=True, slots=True)
class Calibration:
    """An open calibration; statistics are read one matrix at a time.

    Attributes:
        digest: of the file.
        components: component -> digest of its weights.
        matrices: component -> tensor name of the checkpoint -> key of its input, and how many rows of it were seen.
        facts: prompts, steps, shapes: what a report says of it.
        data: sha256 of its statistics, as it was when they were recorded.
    """

    path: Path
    digest: str
    components: Mapping[str, str]
    matrices: Mapping[str, Mapping[str, tuple[str, int]]]
    facts: Mapping[str, Any] = field(default_factory=dict)
    data: str = ""

    def check_data(self) -> None:
        """Raise IntegrityError unless all statistics are those that were recorded, each in its place."""
        with self.path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
        if _digest_data(self.path, start) != self.data:
            raise IntegrityError(
                f"the statistics in {self.path} are not the ones that were recorded; fetch the file again, or run "
                "fluxkiln calibrate"
            )

    def check_checkpoint(self, component: str, digest: str) -> None:
        """Raise SchemeError unless it was made with this component's weights."""
        found = self.components.get(component)
        if found != digest:
            what = f"weights {found[:19]}" if found else "no weights"
            raise SchemeError(
                f"calibration {self.path.name} was made with {what} of {component}, this checkpoint's are "
                f"{digest[:19]}; run fluxkiln calibrate on this checkpoint"
            )

    def statistics(self, component: str, tensor: str, in_features: int) -> Statistics:
        """Of the inputs of one matrix.

        Raises:
            SchemeError: it has none, they are for another width, or not finite.
            IntegrityError: the file is damaged.
        """
        key, count = self._place(component, tensor)
        blocks, rest, peaks, sizes = self._read(f"{key}.{name}" for name in ("blocks", "rest", "peaks", "sizes"))
        found = Statistics((*blocks, *([] if rest is None else [rest])), peaks, count, sizes)
        found.check(tensor, in_features)
        return found

    def outputs(self, component: str, tensor: str) -> NDArray[np.float32]:
        """The largest |y_o| of the products of one matrix, float32 [O]; errors as `statistics`."""
        self._place(component, tensor)
        found: NDArray[np.float32] = self._read([f"{component}.{tensor}.outputs"])[0]
        if not np.isfinite(found).all():
            raise SchemeError(f"calibration of {tensor} has outputs that are not finite; calibrate again")
        return found

    def _place(self, component: str, tensor: str) -> tuple[str, int]:
        try:
            return self.matrices[component][tensor]
        except KeyError:
            raise SchemeError(
                f"calibration {self.path.name} says nothing of {tensor} of {component}; run fluxkiln calibrate again"
            ) from None

    def _read(self, names: Iterable[str]) -> list[Any]:
        """Tensors by name; None for what there is not."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, framework="np") as file:
                known = set(file.keys())
                return [file.get_tensor(name) if name in known else None for name in names]
        except (SafetensorError, OSError) as error:
            raise IntegrityError(f"{self.path} cannot be read ({error}); run fluxkiln calibrate again") from error


def _digest_data(path: Path, start: int) -> str:
    """sha256 of a file from byte `start` on."""
    with path.open("rb") as file:
        file.seek(start)
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_calibration(path: Path, digest: str) -> Calibration:
    """Read what a calibration is of; its statistics are read later.

    Raises:
        IntegrityError: it is no calibration, or cut short.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            known = read_object((file.metadata() or {})[METADATA].encode(), str(path))
            names = set(file.keys())
        if known["format"] != FORMAT:
            raise IntegrityError(f"{path} has format {known['format']}, this is {FORMAT}; run fluxkiln calibrate again")
        matrices = {
            component: {name: (str(key), int(count)) for name, (key, count) in entries.items()}
            for component, entries in known["matrices"].items()
        }
        keys = {key for entries in matrices.values() for key, _ in entries.values()}
        needed = {f"{key}.{name}" for key in keys for name in ("peaks", "sizes", "blocks")}
        needed |= {f"{component}.{name}.outputs" for component, entries in matrices.items() for name in entries}
        if missing := sorted(needed - names):
            raise IntegrityError(f"{path} has no {missing[0]}; run fluxkiln calibrate again")
        return Calibration(path, digest, known["components"], matrices, known["facts"], known["data"])
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{path} is no calibration ({error}); run fluxkiln calibrate to make one") from error


@dataclass(slots=True)
class _Place:
    """Where the sums of one input lie in the file, and how many rows are in them; of outputs none are counted."""

    key: str
    offsets: dict[str, tuple[int, tuple[int, ...]]]
    count: int = 0


@dataclass(slots=True)
class Sums:
    """The file of a calibration while it is being made. The header's room is kept free until the end."""

    path: Path
    block: int
    layers: int
    _file: int = -1
    _end: int = 0
    _places: dict[tuple[str, str], _Place] = field(default_factory=dict)
    _names: dict[tuple[str, str], str] = field(default_factory=dict)
    _last: tuple[Any, str] | None = None

    def __enter__(self) -> Sums:
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    @property
    def _room(self) -> int:
        """Bytes of the header: five tensors and a few names a layer; a multiple of 8."""
        return 4096 + 1536 * self.layers

    def _side(self, width: int) -> int:
        return min(self.block or width, width)

    def add(self, component: str, name: str, inputs: Any, outputs: Any) -> None:
        """Add the rows that a layer is given and makes, torch tensors [..., I] and [..., O].

        A layer that is given what the last one was shares what is known of it.
        """
        made = outputs.detach().float().reshape(-1, outputs.shape[-1])
        place = self._place(f"{component}.{name}", {"outputs": (made.shape[1],)})
        self._add_to(place, "outputs", made.abs().amax(0).numpy(), add=np.maximum)
        last, self._last = self._last, None
        if last is not None and last[0] is inputs:
            self._last = last
            self._names.setdefault((component, name), last[1])
            if self._names[component, name] == last[1]:
                return
        key = self._names.get((component, name), f"{component}.{name}")
        self._names[component, name] = key
        rows = inputs.detach().float().reshape(-1, inputs.shape[-1])
        width = rows.shape[1]
        side = self._side(width)
        shapes: dict[str, tuple[int, ...]] = {"peaks": (width,), "sizes": (width, SIZE_BINS)}
        shapes["blocks"] = (width // side, side, side)
        if width % side:
            shapes["rest"] = (width % side, width % side)
        place = self._place(key, shapes)
        self._add_to(place, "peaks", rows.abs().sum(0).numpy())
        self._add_to(place, "sizes", count_sizes(rows.numpy()))
        whole = width // side * side
        for start in range(0, width, side):
            some = rows[:, start : start + side]
            which, index = ("blocks", start // side) if start < whole else ("rest", 0)
            self._add_to(place, which, (some.T @ some).numpy(), index)
        place.count += len(rows)
        self._last = inputs, key

    def forget_last(self) -> None:
        """The next prompt begins; no tensor of the last is kept."""
        self._last = None

    def finish(self, known: Mapping[str, Any]) -> None:
        """Turn sums into means and write the header.

        Raises:
            CheckpointError: an input was not finite.
        """
        header: dict[str, Any] = {}
        for place in self._places.values():
            for name, (offset, shape) in place.offsets.items():
                for index in range(shape[0] if name == "blocks" else 1):
                    size = shape[1:] if name == "blocks" else shape
                    at = offset + 4 * index * math.prod(size)
                    values = self._read(at, size) / np.float32(place.count or 1)
                    if not np.isfinite(values).all():
                        raise CheckpointError(
                            f"the {'outputs' if name == 'outputs' else 'inputs'} of {place.key} are not finite: the "
                            "model overflows with these prompts or weights; use other prompts, or fetch the checkpoint "
                            "again"
                        )
                    os.pwrite(self._file, values.tobytes(), at)
                begin = offset - self._room - 8
                offsets = [begin, begin + 4 * math.prod(shape)]
                header[f"{place.key}.{name}"] = {"dtype": "F32", "shape": list(shape), "data_offsets": offsets}
        matrices: dict[str, dict[str, list[Any]]] = {}
        for (component, name), key in self._names.items():
            matrices.setdefault(component, {})[name] = [key, self._places[key, "peaks"].count]
        data = _digest_data(self.path, self._room + 8)
        text = json.dumps({"format": FORMAT, "matrices": matrices, "data": data, **known}, sort_keys=True)
        raw = json.dumps({"__metadata__": {METADATA: text}, **header}).encode()
        assert len(raw) <= self._room
        os.pwrite(self._file, self._room.to_bytes(8, "little") + raw.ljust(self._room), 0)

    def _place(self, key: str, shapes: Mapping[str, tuple[int, ...]]) -> _Place:
        own = key, next(iter(shapes))
        if own not in self._places:
            self._end = self._end or self._room + 8
            offsets = {}
            for name, shape in shapes.items():
                offsets[name] = self._end, shape
                self._end += 4 * math.prod(shape)
            os.truncate(self._file, self._end)
            self._places[own] = _Place(key, offsets)
        return self._places[own]

    def _add_to(
        self, place: _Place, name: str, values: NDArray[np.float32], index: int = 0, add: np.ufunc = np.add
    ) -> None:
        at = place.offsets[name][0] + index * values.nbytes
        os.pwrite(self._file, add(self._read(at, values.shape), values).tobytes(), at)

    def _read(self, at: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
        return np.frombuffer(os.pread(self._file, 4 * math.prod(shape), at), np.float32).reshape(shape)
