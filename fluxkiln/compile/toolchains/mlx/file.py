"""Safetensors files as mflux writes a pipeline, and as the MLX FLUX example reads one; and those files read back.

mflux has folders of shards, `0.safetensors` and so on, of 2 GiB at most, and says in each how many bits a code has. A
matrix in codes is three tensors: `weight` (uint32), `scales` and `biases` (bfloat16). Which layers are in codes, with
how many bits, it tells by their shapes. The example has one file for each component, and nothing in codes.

Source: mflux 0.24.0, models/common/weights (`ModelSaver`, `WeightApplier`); ml-explore/mlx-examples,
flux/flux/utils.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.compile.plan import Plan
from fluxkiln.compile.repacked import (
    FileReader,
    FileTensor,
    Placed,
    ReadRows,
    file_names,
    plan_tensors,
    write_tensors,
)
from fluxkiln.errors import IntegrityError, SchemeError
from fluxkiln.export.checkpoint import Checkpoint, read_rows
from fluxkiln.export.safetensors_header import encode_header, read_header
from fluxkiln.patches.model import OtherLayout
from fluxkiln.quantize.formats import FILE_FORMATS, Format
from fluxkiln.types import TensorRef

if TYPE_CHECKING:
    from numpy.typing import NDArray

SHARDED = "mflux"
SHARD_BYTES = 2 << 30
MFLUX_VERSION = "0.24.0"
_INDEX = "model.safetensors.index.json"
_PLANES = ("weight", "scales", "biases")


def layout_of(checkpoint: Checkpoint, layout: str, folder: str) -> OtherLayout:
    """How the files of a folder of the checkpoint have its tensors; UsageError where they have no such component."""
    if layout != SHARDED and folder in checkpoint.model.tokenizers:
        # the publisher's own, found by the names of the published folder
        return OtherLayout(file_names(checkpoint, folder), file=f"{folder}/model.safetensors")
    return checkpoint.model.as_others(layout, folder, checkpoint.configs)


def plan_file(checkpoint: Checkpoint, plan: Plan, folder: str) -> tuple[FileTensor, ...]:
    """The tensors of a folder's files; SchemeError as `plan_tensors`, and for sizes that the program has not."""
    layout, config = layout_of(checkpoint, plan.target.chip, folder), checkpoint.configs[folder]
    for key, value in layout.fixed.items():
        if config[key] != value:
            raise SchemeError(
                f"{folder} has {key} {config[key]}, {plan.target.chip} is made for {value} alone; build the components "
                "that fit with --components, or for another target"
            )
    return plan_tensors(checkpoint, plan, folder, layout.tensors, lambda shape: "")


def write_components(
    checkpoint: Checkpoint, plan: Plan, folder: str, work: Path, count: Callable[[int], None]
) -> dict[str, list[str]]:
    """See `WriteFiles`; errors as `plan_file` and `write_tensors`."""
    tensors = plan_file(checkpoint, plan, folder)
    begins: dict[str, list[str]] = {}
    where: dict[str, str] = {}
    sharded = plan.target.chip == SHARDED
    facts = {"quantization_level": _level(tensors), "mflux_version": MFLUX_VERSION} if sharded else {}
    for number, shard in enumerate(_shards(tensors) if sharded else [tensors]):
        name = f"{folder}/{number}.safetensors" if sharded else layout_of(checkpoint, plan.target.chip, folder).file
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        _write_shard(work / name, shard, facts, count)
        begins[name] = [source.ref.name for one in shard for source in one.rows]
        where |= {plane: Path(name).name for one in shard for plane, _, _ in _entries(one)}
    if "/" in next(iter(begins)):
        index = f"{folder}/{_INDEX}"
        (work / index).write_text(json.dumps({"metadata": facts, "weight_map": where}, indent=2), encoding="utf-8")
        begins[index] = []
    return begins


def _write_shard(
    path: Path, tensors: Sequence[FileTensor], facts: Mapping[str, str], count: Callable[[int], None]
) -> None:
    head = encode_header((entry for one in tensors for entry in _entries(one)), facts)
    ends = iter(list(accumulate((size for one in tensors for size in one.nbytes), initial=len(head))))
    placed = [Placed(one, tuple(next(ends) for _ in one.nbytes)) for one in tensors]
    write_tensors(path, head, placed, next(ends), count)


def _entries(one: FileTensor) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """The tensors that one is in a file: name, dtype, shape."""
    if one.form not in FILE_FORMATS:
        yield one.name, one.form, one.shape
        return
    codes, scales, biases = one.row_bytes
    name = one.name.removesuffix(_PLANES[0])
    yield one.name, "U32", (one.shape[0], codes // 4)
    for plane, size in zip(_PLANES[1:], (scales, biases), strict=True):
        yield f"{name}{plane}", "BF16", (one.shape[0], size // 2)


def _shards(tensors: Sequence[FileTensor]) -> Iterator[list[FileTensor]]:
    shard: list[FileTensor] = []
    for one in tensors:
        if shard and sum(sum(other.nbytes) for other in (*shard, one)) > SHARD_BYTES:
            yield shard
            shard = []
        shard.append(one)
    yield shard


def _level(tensors: Sequence[FileTensor]) -> str:
    """Bits of a code of most of the weights that are in codes, as mflux has it for the whole."""
    counts: dict[int, int] = {}
    for one in tensors:
        if one.form in FILE_FORMATS:
            bits = FILE_FORMATS[one.form].bits
            counts[bits] = counts.get(bits, 0) + math.prod(one.shape)
    return str(max(counts, key=lambda bits: counts[bits]) if counts else None)


def read_components(checkpoint: Checkpoint, plan: Plan, folder: str, paths: Mapping[str, Path]) -> FileReader:
    """See `OpenFiles`; IntegrityError where a tensor is missing or has another dtype or shape."""
    refs = _headers(paths)
    tensors = {one.name: _reader(one, refs) for one in plan_file(checkpoint, plan, folder)}
    layout = layout_of(checkpoint, plan.target.chip, folder)
    return FileReader(checkpoint, folder, layout.tensors, tensors, ", ".join(paths))


def planes_of(
    checkpoint: Checkpoint, plan: Plan, folder: str, paths: Mapping[str, Path]
) -> dict[str, tuple[Format, list[TensorRef]]]:
    """Of each of the checkpoint's tensors that is in codes by itself: their format, and where its three planes lie."""
    refs = _headers(paths)
    return {
        one.rows[0].ref.name: (FILE_FORMATS[one.form], [refs[name] for name, _, _ in _entries(one)])
        for one in plan_file(checkpoint, plan, folder)
        if one.form in FILE_FORMATS and len(one.rows) == 1
    }


def _headers(paths: Mapping[str, Path]) -> dict[str, TensorRef]:
    refs: dict[str, TensorRef] = {}
    for name, path in paths.items():
        refs |= read_header(path) if name.endswith(".safetensors") else {}
    return refs


def _reader(one: FileTensor, refs: Mapping[str, TensorRef]) -> ReadRows:
    import numpy as np

    planes = []
    for name, dtype, shape in _entries(one):
        if name not in refs:
            raise IntegrityError(f"there is no tensor {name}; build it again")
        if (refs[name].dtype, refs[name].shape) != (dtype, shape):
            raise IntegrityError(
                f"{name} is {refs[name].dtype} {list(refs[name].shape)}, {one.form} has {dtype} {list(shape)} there; "
                "build it again"
            )
        planes.append(refs[name])

    def rows(start: int, stop: int) -> NDArray[Any]:
        if one.form not in FILE_FORMATS:
            return read_rows(planes[0], start, stop).astype(np.float32)
        stored = (read_rows(plane, start, stop) for plane in planes)
        unpacked: NDArray[Any] = FILE_FORMATS[one.form].unpack([plane.view(np.uint8) for plane in stored])
        return unpacked

    return rows
