"""Calibration: second moments of the inputs of weight matrices, the file that they are in, and how it is recorded.

For every input that several matrices may share (the query, key and value of an attention say) there are a tensor
`<key>.peaks` [I] and either `<key>.blocks` [n, b, b] or, where b does not divide I, `<key>.blocks` and `<key>.rest`
[r, r]. The metadata entry `calibration` is JSON: which checkpoint, which prompts, and per matrix its key and count.

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fluxkiln.errors import CheckpointError, IntegrityError, SchemeError

FORMAT = 1
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
    """

    blocks: tuple[NDArray[np.float32], ...]
    peaks: NDArray[np.float32]
    count: int

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
        return Statistics(tuple(cut), self.peaks[start:stop], self.count)

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
    return Statistics(blocks, peaks, first.count)


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
        from safetensors import SafetensorError, safe_open

        try:
            key, count = self.matrices[component][tensor]
        except KeyError:
            raise SchemeError(
                f"calibration {self.path.name} says nothing of {tensor} of {component}; run fluxkiln calibrate again"
            ) from None
        try:
            with safe_open(self.path, framework="np") as file:
                names = file.keys()
                blocks = [np.asarray(block) for block in file.get_tensor(f"{key}.blocks")]
                if f"{key}.rest" in names:
                    blocks.append(file.get_tensor(f"{key}.rest"))
                found = Statistics(tuple(blocks), file.get_tensor(f"{key}.peaks"), count)
        except (SafetensorError, OSError) as error:
            raise IntegrityError(f"{self.path} cannot be read ({error}); run fluxkiln calibrate again") from error
        found.check(tensor, in_features)
        return found


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
            known = json.loads((file.metadata() or {})[METADATA])
            names = set(file.keys())
        if known["format"] != FORMAT:
            raise IntegrityError(f"{path} has format {known['format']}, this is {FORMAT}; run fluxkiln calibrate again")
        matrices = {
            component: {name: (str(key), int(count)) for name, (key, count) in entries.items()}
            for component, entries in known["matrices"].items()
        }
        keys = {key for entries in matrices.values() for key, _ in entries.values()}
        if missing := [key for key in sorted(keys) if not {f"{key}.peaks", f"{key}.blocks"} <= names]:
            raise IntegrityError(f"{path} has no statistics of {missing[0]}; run fluxkiln calibrate again")
        return Calibration(path, digest, known["components"], matrices, known["facts"], known["data"])
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{path} is no calibration ({error}); run fluxkiln calibrate to make one") from error


@dataclass(slots=True)
class _Place:
    """Where the sums of one input lie in the file, and how many rows are in them."""

    key: str
    width: int
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
    _places: dict[str, _Place] = field(default_factory=dict)
    _names: dict[tuple[str, str], str] = field(default_factory=dict)
    _last: tuple[Any, str] | None = None

    def __enter__(self) -> Sums:
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    @property
    def _room(self) -> int:
        """Bytes of the header: three tensors and a few names a layer; a multiple of 8."""
        return 4096 + 1024 * self.layers

    def _side(self, width: int) -> int:
        return min(self.block or width, width)

    def add(self, component: str, name: str, inputs: Any) -> None:
        """Add the rows that a layer is given, a torch tensor [..., I]; a layer given what the last one was shares."""
        last, self._last = self._last, None
        if last is not None and last[0] is inputs:
            self._last = last
            self._names.setdefault((component, name), last[1])
            if self._names[component, name] == last[1]:
                return
        key = self._names.get((component, name), f"{component}.{name}")
        self._names[component, name] = key
        rows = inputs.detach().float().reshape(-1, inputs.shape[-1])
        place = self._place(key, rows.shape[1])
        side = self._side(place.width)
        self._add_to(place, "peaks", rows.abs().sum(0).numpy())
        whole = place.width // side * side
        for start in range(0, place.width, side):
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
                    values = self._read(at, size) / np.float32(place.count)
                    if not np.isfinite(values).all():
                        raise CheckpointError(
                            f"the inputs of {place.key} are not finite: the model overflows with these prompts or "
                            "weights; use other prompts, or fetch the checkpoint again"
                        )
                    os.pwrite(self._file, values.tobytes(), at)
                begin = offset - self._room - 8
                offsets = [begin, begin + 4 * math.prod(shape)]
                header[f"{place.key}.{name}"] = {"dtype": "F32", "shape": list(shape), "data_offsets": offsets}
        matrices: dict[str, dict[str, list[Any]]] = {}
        for (component, name), key in self._names.items():
            matrices.setdefault(component, {})[name] = [key, self._places[key].count]
        data = _digest_data(self.path, self._room + 8)
        text = json.dumps({"format": FORMAT, "matrices": matrices, "data": data, **known}, sort_keys=True)
        raw = json.dumps({"__metadata__": {METADATA: text}, **header}).encode()
        assert len(raw) <= self._room
        os.pwrite(self._file, self._room.to_bytes(8, "little") + raw.ljust(self._room), 0)

    def _place(self, key: str, width: int) -> _Place:
        if key not in self._places:
            self._end = self._end or self._room + 8
            side = self._side(width)
            shapes: dict[str, tuple[int, ...]] = {"peaks": (width,), "blocks": (width // side, side, side)}
            if width % side:
                shapes["rest"] = (width % side, width % side)
            offsets = {}
            for name, shape in shapes.items():
                offsets[name] = self._end, shape
                self._end += 4 * math.prod(shape)
            os.truncate(self._file, self._end)
            self._places[key] = _Place(key, width, offsets)
        return self._places[key]

    def _add_to(self, place: _Place, name: str, values: NDArray[np.float32], index: int = 0) -> None:
        at = place.offsets[name][0] + index * values.nbytes
        os.pwrite(self._file, (self._read(at, values.shape) + values).tobytes(), at)

    def _read(self, at: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
        return np.frombuffer(os.pread(self._file, 4 * math.prod(shape), at), np.float32).reshape(shape)
