"""Random weights streamed into sharded safetensors: every tensor distinct, scaled so that every block matters.

Values are uniform, as torch's own initialisation is: random 16-bit integers times one factor, rounded to bfloat16.
Only integers and IEEE multiplication are involved, so the same preset and seed give the same bytes on every machine.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from fluxkiln.patches.model import WeightRule

Bits = np.ndarray[Any, np.dtype[np.uint16]]
Count = Callable[[int], None]
# name and shape of a tensor -> its bits
Draw = Callable[[str, tuple[int, ...]], Iterator[Bits]]

_POOL = 1 << 20
_CHUNK = 1 << 18


def tensor_bits(
    rules: Sequence[WeightRule], component: str, seed: int, name: str, shape: tuple[int, ...]
) -> Iterator[Bits]:
    """The tensor's bfloat16 values, row-major, as chunks of 16-bit patterns; the same for the same arguments."""
    rule = next(rule for rule in rules if re.search(rule.pattern, name))
    std = rule.gain / math.sqrt(math.prod(shape[1:])) if rule.fan_in else rule.gain
    size, key = math.prod(shape), f"{seed}/{component}/{name}"
    runs = rule.runs or (1.0,)
    for i, factor in enumerate(runs):
        yield from _draw(f"{key}/{i}", size // len(runs), std * factor, rule.mean)


def _draw(key: str, size: int, std: float, mean: float) -> Iterator[Bits]:
    """`size` values: runs of the pool of magnitudes and of the pool of signs, from places that `key` decides."""
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")
    raw = np.random.Philox(key=number).random_raw(2 * math.ceil(size / _CHUNK))
    starts = (raw % np.uint64(_POOL - _CHUNK)).reshape(-1, 2).tolist()
    magnitudes, signs = _pools()
    for i, (a, b) in enumerate(starts):
        count = min(_CHUNK, size - i * _CHUNK)
        if mean:
            values = magnitudes[a : a + count] * np.float32(std)
            yield _round_to_bf16(np.where(signs[b : b + count], -values, values) + np.float32(mean))
        elif size < _CHUNK:
            yield _round_to_bf16(magnitudes[a : a + count] * np.float32(std)) ^ signs[b : b + count]
        else:
            # Scaled once for all large tensors of this width.
            yield _scaled_pool(std)[a : a + count] ^ signs[b : b + count]


@lru_cache(maxsize=1)
def _pools() -> tuple[np.ndarray[Any, np.dtype[np.float32]], Bits]:
    """Magnitudes that, with random signs, are uniform with variance 1; and random sign bits."""
    raw = np.random.Philox(key=1).random_raw(_POOL // 4).view(np.uint16)
    magnitudes = (raw.astype(np.float32) + np.float32(0.5)) * np.float32(math.sqrt(3) / 65536)
    signs = np.random.Philox(key=2).random_raw(_POOL // 4).view(np.uint16) & np.uint16(0x8000)
    return magnitudes, signs


@lru_cache(maxsize=16)
def _scaled_pool(std: float) -> Bits:
    return _round_to_bf16(_pools()[0] * np.float32(std))


def _round_to_bf16(values: np.ndarray[Any, np.dtype[np.float32]]) -> Bits:
    """Round to nearest, ties to even; finite values only."""
    bits = values.view(np.uint32)
    return ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)


def write_component(
    folder: Path, stem: str, layout: Mapping[str, tuple[int, ...]], shards: int, draw: Draw, count: Count
) -> None:
    """Write one component's weights as `stem.safetensors`, or as about equal `shards` with an index.

    Memory stays constant: headers are known from the layout, values are written chunk by chunk.
    """
    if shards == 1:
        _write_shard(folder / f"{stem}.safetensors", layout, draw, count)
        return
    total = sum(2 * math.prod(shape) for shape in layout.values())
    members: list[dict[str, tuple[int, ...]]] = [{} for _ in range(shards)]
    start = 0
    for name, shape in layout.items():
        members[start * shards // total][name] = shape
        start += 2 * math.prod(shape)
    weight_map = {}
    for i, shard in enumerate(members, start=1):
        file = f"{stem}-{i:05d}-of-{shards:05d}.safetensors"
        _write_shard(folder / file, shard, draw, count)
        weight_map.update(dict.fromkeys(shard, file))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_shard(file: Path, shard: Mapping[str, tuple[int, ...]], draw: Draw, count: Count) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shard.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    # Padded as safetensors' own writer does, so that the data starts at a multiple of 8.
    text += b" " * (-len(text) % 8)
    with file.open("wb", buffering=0) as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shard.items():
            for bits in draw(name, shape):
                view = bits.astype("<u2", copy=False).data.cast("B")
                while view:
                    view = view[stream.write(view) :]
                count(bits.nbytes)
