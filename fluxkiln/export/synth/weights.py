"""Random weights streamed into sharded safetensors: every tensor distinct, scaled so that every block matters.

Values are uniform, as torch's own initialisation is: random 16-bit integers times one factor, rounded to bfloat16.
Only integers and IEEE multiplication are involved, so the same preset and seed give the same bytes on every machine.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

Bits = np.ndarray[Any, np.dtype[np.uint16]]
Count = Callable[[int], None]

_POOL = 1 << 20
_CHUNK = 1 << 18


@dataclass(frozen=True, slots=True)
class WeightRule:
    """How tensors whose name matches `pattern` are drawn: uniform around `mean`.

    The standard deviation is `gain / sqrt(fan_in)` with `fan_in` set, plain `gain` without. `runs` are factors for
    equal runs of rows.
    """

    pattern: str
    gain: float
    mean: float = 0.0
    fan_in: bool = True
    runs: tuple[float, ...] = ()


# AdaLN's shift, scale and gate: small shifts keep tokens different from one another, large gates make blocks matter.
_ADALN = (0.2, 0.6, 1.4)
# a double block updates each stream twice
_ADALN_TWICE = 2 * (0.2, 0.6, 0.9)

# The first match counts. The gains keep the residual streams within a few units at 57 blocks while each block adds
# 10 % to 100 % of its stream; the tests hold both.
RULES: Mapping[str, tuple[WeightRule, ...]] = {
    "text_encoder": (
        WeightRule(r"norm\d?\.weight", 0.2, mean=1.0, fan_in=False),
        WeightRule(r"token_embedding", 0.7, fan_in=False),
        WeightRule(r"position_embedding", 0.4, fan_in=False),
        WeightRule(r"\.bias", 0.15, fan_in=False),
        WeightRule(r"(out_proj|fc2)\.weight", 0.6),
        WeightRule(r"", 1.0),
    ),
    "text_encoder_2": (
        WeightRule(r"layer_norm\.weight", 0.2, mean=1.0, fan_in=False),
        WeightRule(r"shared", 1.0, fan_in=False),
        WeightRule(r"relative_attention_bias", 0.7, fan_in=False),
        # T5 does not divide attention scores by the square root of the head width, here 64.
        WeightRule(r"SelfAttention\.q", 0.125),
        WeightRule(r"SelfAttention\.o|\.wo", 0.7),
        WeightRule(r"", 1.0),
    ),
    "transformer": (
        WeightRule(r"norm_(added_)?[qk]\.weight", 0.2, mean=1.3, fan_in=False),
        WeightRule(r"norm_out\.linear\.bias", 0.3, fan_in=False),
        WeightRule(r"norm_out\.linear\.weight", 0.4),
        WeightRule(r"norm\.linear\.bias", 0.5, fan_in=False, runs=_ADALN),
        WeightRule(r"norm\.linear\.weight", 0.5, runs=_ADALN),
        WeightRule(r"norm1\w*\.linear\.bias", 0.5, fan_in=False, runs=_ADALN_TWICE),
        WeightRule(r"norm1\w*\.linear\.weight", 0.5, runs=_ADALN_TWICE),
        WeightRule(r"embedder\.linear_1\.weight", 1.4),
        WeightRule(r"(to_out\.0|to_add_out|net\.2|blocks\.\d+\.proj_out)\.bias", 0.15, fan_in=False),
        WeightRule(r"\.bias", 0.15, fan_in=False),
        WeightRule(r"(net\.2|blocks\.\d+\.proj_out)\.weight", 1.3),
        WeightRule(r"", 1.0),
    ),
    "vae": (
        WeightRule(r"norm\w*\.weight", 0.2, mean=1.0, fan_in=False),
        WeightRule(r"\.bias", 0.1, fan_in=False),
        WeightRule(r"conv_out\.weight", 0.6),
        WeightRule(r"", 1.0),
    ),
    "vae_tiny": (
        # The decoder's last layer: its result is in [0, 1] before it is stretched to [-1, 1].
        WeightRule(r"decoder\.layers\.(12|18)\.bias", 0.05, mean=0.5, fan_in=False),
        WeightRule(r"decoder\.layers\.(12|18)\.weight", 0.5),
        WeightRule(r"\.bias", 0.1, fan_in=False),
        WeightRule(r"conv\.4\.weight", 0.5),
        WeightRule(r"", 1.0),
    ),
}


def tensor_bits(component: str, name: str, shape: tuple[int, ...], seed: int) -> Iterator[Bits]:
    """The tensor's bfloat16 values, row-major, as chunks of 16-bit patterns; the same for the same arguments."""
    rule = next(rule for rule in RULES[component] if re.search(rule.pattern, name))
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
    folder: Path,
    stem: str,
    component: str,
    layout: Mapping[str, tuple[int, ...]],
    shards: int,
    seed: int,
    count: Count,
) -> None:
    """Write one component's weights as `stem.safetensors`, or as about equal `shards` with an index.

    Memory stays constant: headers are known from the layout, values are written chunk by chunk.
    """
    if shards == 1:
        _write_shard(folder / f"{stem}.safetensors", component, layout, seed, count)
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
        _write_shard(folder / file, component, shard, seed, count)
        weight_map.update(dict.fromkeys(shard, file))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_shard(file: Path, component: str, shard: Mapping[str, tuple[int, ...]], seed: int, count: Count) -> None:
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
            for bits in tensor_bits(component, name, shape, seed):
                view = bits.astype("<u2", copy=False).data.cast("B")
                while view:
                    view = view[stream.write(view) :]
                count(bits.nbytes)
