"""Sums over inputs while a calibration is recorded: in the file that is being made, one input's in memory at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fluxkiln.errors import CheckpointError
from fluxkiln.quantize.calibration import FORMAT, METADATA, digest_data


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
                    at = offset + index * int(np.prod(size)) * 4
                    values = self._read(at, size) / np.float32(place.count)
                    if not np.isfinite(values).all():
                        raise CheckpointError(
                            f"the inputs of {place.key} are not finite: the model overflows with these prompts or "
                            "weights; use other prompts, or fetch the checkpoint again"
                        )
                    os.pwrite(self._file, values.tobytes(), at)
                begin, size_bytes = offset - self._room - 8, int(np.prod(shape)) * 4
                header[f"{place.key}.{name}"] = {
                    "dtype": "F32", "shape": list(shape), "data_offsets": [begin, begin + size_bytes],
                }  # fmt: skip
        matrices: dict[str, dict[str, list[Any]]] = {}
        for (component, name), key in self._names.items():
            matrices.setdefault(component, {})[name] = [key, self._places[key].count]
        data = digest_data(self.path, self._room + 8)
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
                size = 4
                for length in shape:
                    size *= length
                self._end += size
            os.truncate(self._file, self._end)
            self._places[key] = _Place(key, width, offsets)
        return self._places[key]

    def _add_to(self, place: _Place, name: str, values: NDArray[np.float32], index: int = 0) -> None:
        at = place.offsets[name][0] + index * values.nbytes
        os.pwrite(self._file, (self._read(at, values.shape) + values).tobytes(), at)

    def _read(self, at: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
        size = 4 * int(np.prod(shape))
        return np.frombuffer(os.pread(self._file, size, at), np.float32).reshape(shape)
