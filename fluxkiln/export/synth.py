"""Synthetic checkpoints: a model's architecture and folder layout with random weights, made offline in seconds.

Weights are streamed into sharded safetensors, scaled so that every block matters. Values are uniform, as torch's own
initialisation is: random 16-bit integers times one factor, rounded to bfloat16. Other statistics divide by square roots
and add to exponents. Only integers and operations that IEEE 754 rounds in one way are involved, so the same preset,
statistics and seed give the same bytes on every machine.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from fluxkiln.errors import UsageError
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.export.folders import check_destination, trained_folder, whole_or_nothing
from fluxkiln.export.safetensors_header import encode_header
from fluxkiln.patches.model import Model, Preset, WeightRule
from fluxkiln.patches.registry import all_presets, check_statistics, pick_components
from fluxkiln.progress import OnBytes, byte_counter
from fluxkiln.settings import DEFAULT_STATISTICS
from fluxkiln.types import TensorRef

Bits = np.ndarray[Any, np.dtype[np.uint16]]
Count = Callable[[int], None]
# name and shape of a tensor -> its bits
Draw = Callable[[str, tuple[int, ...]], Iterator[Bits]]

_POOL = 1 << 20
_CHUNK = 1 << 18
# As many files as FLUX.1 has; one for the others.
_SHARDS = {"text_encoder_2": 2, "transformer": 3}

_LICENSE = """\
This is a synthetic checkpoint, written by `fluxkiln synth`.

It has the architecture and the folder layout of {title}, and random numbers in place of weights. It contains no trained
weights and nothing derived from any. It makes no pictures of anything.

The numbers, tokenizers and configuration files of this folder are licensed under the Apache License, Version 2.0
(https://www.apache.org/licenses/LICENSE-2.0). They come without warranty of any kind.
"""


def find_preset(name: str) -> tuple[Model, Preset]:
    """The preset called `name` and its model; UsageError with the legal names otherwise."""
    presets = all_presets()
    if name not in presets:
        raise UsageError(f"no preset is called {name!r}; synthetic presets are {', '.join(presets)}")
    return presets[name]


def synthesized_bytes(preset: str, components: Collection[str] | None = None) -> int:
    """Bytes of weights that `synthesize` writes."""
    model, found = find_preset(preset)
    layouts = (model.layout(name, found.configs[name]) for name in pick_components(tuple(model.classes), components))
    return sum(2 * math.prod(shape) for layout in layouts for shape in layout.values())


def with_sisters(model: Model, components: Collection[str]) -> tuple[str, ...]:
    """`components` of a pipeline as `synthesize` takes them: a VAE comes with its tiny sister."""
    return tuple(name for name in model.classes if any(name in (one, f"{one}_tiny") for one in components))


def unwritten_checkpoint(preset: str, components: Collection[str]) -> Checkpoint:
    """The checkpoint that `synthesize` would write, by names and shapes; its files do not exist."""
    (model, found), tensors = find_preset(preset), {}
    for name in with_sisters(model, components):
        shapes = model.layout(name, found.configs[name])
        tensors[name] = {
            tensor: TensorRef(tensor, Path(name), "BF16", shapes[old], 0, 2 * math.prod(shapes[old]))
            for tensor, old in model.state_names(name, shapes).items()
        }
    configs = {name: found.configs[name] for name in (*tensors, "scheduler")}
    return Checkpoint(Path(preset), preset, model.variant(found.configs), configs, tensors, {}, None, model)


def synthesize(
    preset: str,
    destination: Path,
    components: Collection[str] | None = None,
    seed: int = 0,
    progress: OnBytes | None = None,
    statistics: str = DEFAULT_STATISTICS,
) -> Path:
    """Write a checkpoint of random bfloat16 weights in the diffusers layout.

    Written beside `destination` and renamed at the end: the folder is there whole or not at all. Memory stays constant.

    Args:
        preset: see `find_preset`.
        destination: a folder that does not exist or is empty.
        components: which folders with weights to write; without all of them diffusers cannot load the whole.
        seed: other seeds give other weights.
        progress: called with bytes of weights written and to be written.
        statistics: how the weights are drawn, see `Model.statistics`.

    Returns:
        `destination`.

    Raises:
        UsageError: an unknown preset, component or name of statistics, or `destination` has something in it.
        ResourceError: not enough room on the disk.
    """
    model, chosen = find_preset(preset)
    check_statistics(preset, statistics)
    names = pick_components(tuple(model.classes), components)
    total = synthesized_bytes(preset, names)
    check_destination(destination)
    count = byte_counter(total, progress)
    if chosen.trained:
        return _copy_trained(chosen, destination, names, seed, total)
    with whole_or_nothing(destination, total, "choose another folder or a smaller preset") as folder:
        write_small_files(folder, model, chosen, names, _LICENSE.format(title=model.title))
        rules = model.statistics.get(statistics, model.weight_rules)
        for name in names:
            stem = "model" if name in model.tokenizers else "diffusion_pytorch_model"
            layout = model.layout(name, chosen.configs[name])
            draw = partial(tensor_bits, rules[name], name, seed)
            write_component(folder / name, stem, layout, _SHARDS.get(name, 1), draw, count)
    return destination


def _copy_trained(preset: Preset, destination: Path, components: Collection[str], seed: int, total: int) -> Path:
    root = trained_folder(preset)
    if seed:
        raise UsageError(f"--seed {seed}: {preset.name} is trained, it has its own weights; leave the seed out")
    left_out = {name for name in find_preset(preset.name)[0].classes if name not in components}
    with whole_or_nothing(destination, total, "choose another folder") as folder:
        shutil.copytree(root, folder, dirs_exist_ok=True, ignore=lambda _, names: left_out & {*names})
    return destination


def write_small_files(
    folder: Path, model: Model, preset: Preset, components: Collection[str], licence: str, sentences: Sequence[str] = ()
) -> None:
    """Write all of a preset's checkpoint but the weights; the tokenizers learn from `sentences`, if there are any."""
    index: dict[str, Any] = {"_class_name": model.pipeline_class, "_diffusers_version": "0.42.1"}
    index["scheduler"] = ["diffusers", preset.configs["scheduler"]["_class_name"]]
    _write_json(folder / "scheduler" / "scheduler_config.json", preset.configs["scheduler"])
    for name in components:
        _write_json(folder / name / "config.json", preset.configs[name])
        if name in model.components:
            index[name] = [model.libraries[name], model.classes[name]]
    tokenizers = model.write_tokenizers(folder, {name: preset.configs[name] for name in components}, sentences)
    index |= {name: ["transformers", found] for name, found in tokenizers.items()}
    _write_json(folder / "model_index.json", dict(sorted(index.items())))
    (folder / "LICENSE").write_text(licence, encoding="utf-8")


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def tensor_bits(
    rules: Sequence[WeightRule], component: str, seed: int, name: str, shape: tuple[int, ...]
) -> Iterator[Bits]:
    """The tensor's bfloat16 values, row-major, as chunks of 16-bit patterns; the same for the same arguments."""
    rule = next(rule for rule in rules if re.search(rule.pattern, name))
    width, runs = math.prod(shape[1:]), rule.runs or (1.0,)
    std = (rule.gain / math.sqrt(width) if rule.fan_in else rule.gain) / (_rms(rule.rows) * _rms(rule.columns))
    rows, key = shape[0] // len(runs), f"{seed}/{component}/{name}"
    draw = _draw_spread if rule.rows or rule.columns else _draw
    for i, factor in enumerate(runs):
        pins = [(round(pin.row * rows) * width + round(pin.column * width), pin) for pin in rule.pins if pin.run == i]
        start = 0
        for bits in draw(f"{key}/{i}", (rows, width), std * factor, rule):
            for place, pin in pins:
                if start <= place < start + bits.size:
                    bits[place - start] = _round_to_bf16(np.array([pin.value], np.float32))[0]
            start += bits.size
            yield bits


def _rms(octaves: tuple[int, ...]) -> float:
    return math.sqrt(sum(4.0**octave for octave in octaves) / len(octaves)) if octaves else 1.0


def _draw_spread(key: str, shape: tuple[int, int], std: float, rule: WeightRule) -> Iterator[Bits]:
    """The same of a matrix whose rows and columns differ: a power of two is added to the exponents of its values."""
    rows, columns = (
        _exponents(f"{key}/{side}", count, octaves)
        for side, count, octaves in (("rows", shape[0], rule.rows), ("columns", shape[1], rule.columns))
    )
    step = _CHUNK // shape[1]
    chunks = _draw(key, shape, std, rule, step * shape[1])
    for start, bits in zip(range(0, shape[0], step), chunks, strict=True):
        yield (bits.reshape(-1, shape[1]) + (rows[start : start + step, None] + columns)).reshape(-1)


def _exponents(key: str, count: int, octaves: tuple[int, ...]) -> Bits:
    """`count` numbers out of `octaves`, to be added to bfloat16 patterns; modulo 65536, as the addition is."""
    patterns = np.array([octave % 512 << 7 for octave in octaves or (0,)], np.uint16)
    drawn: Bits = patterns[_generator(key).random_raw(count) % np.uint64(len(patterns))]
    return drawn


def _generator(key: str) -> np.random.Philox:
    return np.random.Philox(key=int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little"))


def _draw(key: str, shape: tuple[int, int], std: float, rule: WeightRule, chunk: int = _CHUNK) -> Iterator[Bits]:
    """Values: runs of the pool of magnitudes and of the pool of signs, from places that `key` decides."""
    size = math.prod(shape)
    raw = _generator(key).random_raw(2 * math.ceil(size / chunk))
    starts = (raw % np.uint64(_POOL - _CHUNK)).reshape(-1, 2).tolist()
    magnitudes, signs = _magnitudes(rule.tails), _signs()
    for i, (a, b) in enumerate(starts):
        count = min(chunk, size - i * chunk)
        if rule.mean:
            values = magnitudes[a : a + count] * np.float32(std)
            yield _round_to_bf16(np.where(signs[b : b + count], -values, values) + np.float32(rule.mean))
        elif size < _CHUNK:
            yield _round_to_bf16(magnitudes[a : a + count] * np.float32(std)) ^ signs[b : b + count]
        else:
            # Scaled once for all large tensors of this width.
            yield _scaled_pool(std, rule.tails)[a : a + count] ^ signs[b : b + count]


@lru_cache(maxsize=2)
def _magnitudes(tails: bool) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Magnitudes that, with random signs, have variance 1: uniform, or of sums of four uniform numbers u over a root.

    The root is the fourth of another uniform number v from 1/1024 up, which is where the tails come from.
    """
    if not tails:
        raw = np.random.Philox(key=1).random_raw(_POOL // 4).view(np.uint16)
        return (raw.astype(np.float32) + np.float32(0.5)) * np.float32(math.sqrt(3) / 65536)
    *terms, last = np.random.Philox(key=3).random_raw(5 * _POOL // 4).view(np.uint16).reshape(5, _POOL)
    # None is 0, and all sums are exact.
    sums = np.abs(sum((term.astype(np.float32) for term in terms), np.float32(0.5 - 2 * 65535)))
    root = np.sqrt(np.sqrt((last.astype(np.float32) + 64) * np.float32(1 / 65536)))
    # The mean of 1 / sqrt(v), and the variance of the sum.
    variance = 2 * (math.sqrt(1 + 1 / 1024) - math.sqrt(1 / 1024)) * 4 / 12
    magnitudes: np.ndarray[Any, np.dtype[np.float32]] = sums / root * np.float32(1 / (65536 * math.sqrt(variance)))
    return magnitudes


@lru_cache(maxsize=1)
def _signs() -> Bits:
    return np.random.Philox(key=2).random_raw(_POOL // 4).view(np.uint16) & np.uint16(0x8000)


@lru_cache(maxsize=16)
def _scaled_pool(std: float, tails: bool) -> Bits:
    return _round_to_bf16(_magnitudes(tails) * np.float32(std))


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
    tensors = ((name, "BF16", shape) for name, shape in shard.items())
    with file.open("wb") as stream:
        stream.write(encode_header(tensors, {"format": "pt"}, (",", ":")))
        for name, shape in shard.items():
            for bits in draw(name, shape):
                stream.write(bits.astype("<u2", copy=False).data)
                count(bits.nbytes)
