"""GGUF files of components, written a piece at a time and read back by the format's own reader.

The layout is that of the published FLUX.1 files: Black Forest Labs' names without a prefix, everything that is no
matrix in float32, quantized matrices in blocks, the others in 16 bits. T5 has llama.cpp's names and metadata.

Source: GGUF's specification, github.com/ggml-org/ggml, docs/gguf.md; headers are written by the `gguf` package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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
from fluxkiln.errors import IntegrityError
from fluxkiln.export.checkpoint import Checkpoint, read_rows
from fluxkiln.export.safetensors_header import encode_header, read_header
from fluxkiln.patches.model import OtherLayout
from fluxkiln.types import TensorRef

if TYPE_CHECKING:
    from numpy.typing import NDArray

# what a folder's file has its names from; the others are safetensors with their publisher's names
LAYOUTS: Mapping[str, str] = {"transformer": "bfl", "text_encoder_2": "llama.cpp"}
# matrices of no more elements are float32 too
MOST_PLAIN_ELEMENTS = 1024


def file_name(folder: str) -> str:
    """What the file of a folder of the checkpoint is called."""
    return f"{folder}.{'gguf' if folder in LAYOUTS else 'safetensors'}"


def layout_of(checkpoint: Checkpoint, folder: str) -> OtherLayout:
    """How the file has its tensors."""
    if folder in LAYOUTS:
        return checkpoint.model.as_others(LAYOUTS[folder], folder, checkpoint.configs)
    return OtherLayout(file_names(checkpoint, folder))


def plan_file(checkpoint: Checkpoint, plan: Plan, folder: str) -> tuple[FileTensor, ...]:
    """The tensors of a file; SchemeError as `plan_tensors`."""

    def small(shape: tuple[int, ...]) -> str:
        return "F32" if folder in LAYOUTS and (len(shape) < 2 or math.prod(shape) <= MOST_PLAIN_ELEMENTS) else ""

    return plan_tensors(checkpoint, plan, folder, layout_of(checkpoint, folder).tensors, small)


def write_file(checkpoint: Checkpoint, plan: Plan, folder: str, path: Path, count: Callable[[int], None]) -> None:
    """Write the file of a folder of the checkpoint; errors as `write_tensors`."""
    tensors = plan_file(checkpoint, plan, folder)
    if folder in LAYOUTS:
        head, offsets, size = _gguf_head(layout_of(checkpoint, folder), tensors, path)
    else:
        head = encode_header((one.name, one.form, one.shape) for one in tensors)
        ends = list(accumulate((sum(one.nbytes) for one in tensors), initial=len(head)))
        offsets, size = ends[:-1], ends[-1]
    placed = [Placed(one, (offset,)) for one, offset in zip(tensors, offsets, strict=True)]
    write_tensors(path, head, placed, size, count)


def _gguf_head(layout: OtherLayout, tensors: Sequence[FileTensor], path: Path) -> tuple[bytes, list[int], int]:
    """What comes before the tensors, where each of them begins, and the size of the whole."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, layout.architecture)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(_file_type(tensors))
    for key, value in layout.facts.items():
        if isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
    for one in tensors:
        # the package wants rows of bytes, and makes elements of them again
        shape = (*one.shape[:-1], sum(one.nbytes) // math.prod(one.shape[:-1]))
        writer.add_tensor_info(
            one.name, shape, np.dtype(np.uint8), sum(one.nbytes), gguf.GGMLQuantizationType[one.form]
        )  # fmt: skip
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    head, align = path.read_bytes(), writer.data_alignment
    sizes = [writer.ggml_pad(size, align) for size in (len(head), *(sum(one.nbytes) for one in tensors))]
    ends = list(accumulate(sizes))
    return head, ends[:-1], ends[-1]


def _file_type(tensors: Sequence[FileTensor]) -> int:
    """What most of its weights are, as llama.cpp numbers it."""
    import gguf

    counts: dict[str, int] = {}
    for one in tensors:
        counts[one.form] = counts.get(one.form, 0) + math.prod(one.shape)
    form = max(counts, key=lambda name: counts[name])
    name = {"F32": "ALL_F32", "Q4_K": "MOSTLY_Q4_K_M", "Q5_K": "MOSTLY_Q5_K_M"}.get(form, f"MOSTLY_{form}")
    return int(gguf.LlamaFileType[name])


def open_file(checkpoint: Checkpoint, folder: str, path: Path) -> FileReader:
    """What reads the tensors of a folder of the checkpoint from its file; IntegrityError for a damaged one."""
    tensors = _gguf_tensors(path) if folder in LAYOUTS else _plain_tensors(path)
    return FileReader(checkpoint, folder, layout_of(checkpoint, folder).tensors, tensors, str(path))


def _plain_tensors(path: Path) -> dict[str, ReadRows]:
    import numpy as np

    def reader(ref: TensorRef) -> ReadRows:
        return lambda start, stop: read_rows(ref, start, stop).astype(np.float32)

    return {name: reader(ref) for name, ref in read_header(path).items()}


def stored_tensors(path: Path) -> list[Any]:
    """What gguf's own reader finds; IntegrityError for no GGUF file, or a damaged one."""
    import gguf

    try:
        return list(gguf.GGUFReader(path).tensors)
    except (ValueError, OSError, IndexError) as error:
        raise IntegrityError(f"{path} is no GGUF file, or a damaged one ({error}); build or fetch it again") from error


def _gguf_tensors(path: Path) -> dict[str, ReadRows]:
    import gguf
    import numpy as np

    def reader(one: Any) -> ReadRows:
        def rows(start: int, stop: int) -> NDArray[Any]:
            decoded: NDArray[Any] = gguf.dequantize(np.ascontiguousarray(one.data[start:stop]), one.tensor_type)
            return decoded

        return rows

    return {one.name: reader(one) for one in stored_tensors(path)}
