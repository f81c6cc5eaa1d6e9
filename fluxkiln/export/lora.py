"""LoRAs fused into a checkpoint: a new folder in which only the touched shards are new files.

W' = W + strength * alpha / rank * up @ down, in float32, rounded once to the dtype that is stored. Everything else is
linked: other components, configs, tokenizers, shards that no LoRA touches. Touched shards are streamed: their headers
and untouched tensors are copied byte for byte, touched tensors computed some rows at a time.

Shapes: O = out features, I = in features, R = rank.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fluxkiln.documents import read_object_file
from fluxkiln.errors import CheckpointError, IntegrityError, UsageError
from fluxkiln.export.checkpoint import FLOAT_DTYPES, Checkpoint, open_checkpoint
from fluxkiln.export.contents import open_contents
from fluxkiln.export.fingerprint import DigestMemo, check_unchanged, digest_tensors, shard_states
from fluxkiln.export.folders import check_destination, whole_or_nothing
from fluxkiln.export.lora_file import LoraFile, Piece, digest_lora, read_lora
from fluxkiln.export.safetensors_header import read_into
from fluxkiln.progress import OnBytes, byte_counter
from fluxkiln.types import TensorRef

if TYPE_CHECKING:
    from torch import Tensor

# A LoRA's file and its strength.
Lora = tuple[Path, float]
Links = Literal["hard", "symbolic"]

COMPONENT = "transformer"
RECORD = "lora.json"
# Raise when other bytes are written for the same input: fused checkpoints are found again by it.
_FORMAT = 1
_WEIGHTS = (".safetensors", ".sft", ".gguf", ".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".onnx")
_BLOCK_ITEMS = 1 << 20
_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Fused:
    """A checkpoint with LoRAs in it: its folder, the transformer's tensors that differ, bytes of new files."""

    folder: Path
    tensors: tuple[str, ...]
    nbytes: int


def fuse_lora(
    checkpoint: Path, loras: Sequence[Lora], destination: Path, progress: OnBytes | None = None, links: Links = "hard"
) -> Fused:
    """Write `checkpoint` with the LoRAs in its transformer to `destination`, which is there whole or not at all.

    Memory: the LoRAs' numbers in float32, twice for the one that is being read, and 20 MB.

    Args:
        checkpoint: a folder in the diffusers layout; it is only read.
        loras: files and strengths; a file may come more than once.
        destination: a folder that does not exist or is empty.
        links: `hard` links need nothing of `checkpoint` later, and are copies where the file system has none;
            `symbolic` ones leave its files alone, ctimes included, and need them.

    Raises:
        UsageError: no such file, a strength that is no number, `destination` has something in it.
        CheckpointError: no checkpoint; no LoRA, or none for this checkpoint; a result that is not finite.
        ResourceError: not enough room on the disk.
    """
    check_destination(destination)
    check_loras(loras)
    opened = open_checkpoint(checkpoint, (COMPONENT,))
    refs = opened.tensors[COMPONENT]
    most = 2 * sum(math.prod(ref.shape) for ref in refs.values())
    files = {file: read_lora(file, opened.model, most) for file, _ in loras}
    changes: dict[str, list[tuple[Piece, float]]] = {}
    for file, strength in loras:
        for piece in files[file].pieces:
            _check_fits(files[file], piece, opened)
            changes.setdefault(piece.tensor, []).append((piece, strength))
    states = shard_states(refs.values())
    touched = {refs[name].file for name in changes}
    linked = _linked_files(opened, touched)
    parent = next(path for path in destination.absolute().parents if path.exists())
    apart = [path for path in linked.values() if links == "hard" and path.stat().st_dev != parent.stat().st_dev]
    written = sum(states[file].size for file in touched)
    total = written + sum(path.stat().st_size for path in apart)
    count = byte_counter(total, progress)
    with whole_or_nothing(destination, total, "choose another folder") as folder:
        for name, path in linked.items():
            if _link(path, folder / name, links):
                count(path.stat().st_size if path in apart else 0)
        for name, path in _shard_names(opened).items():
            if path in touched:
                held = [ref for ref in refs.values() if ref.file == path]
                _write_shard(path, folder / name, held, changes, count)
        check_unchanged(states, refs.values())
        _write_record(folder / RECORD, opened, [(files[file], strength) for file, strength in loras], changes)
    return Fused(destination, tuple(sorted(changes)), written)


def fused_folder(
    checkpoint: Path, loras: Sequence[Lora], models: Path, memo: DigestMemo, progress: OnBytes | None = None
) -> Path:
    """Where the fused checkpoint of these inputs is kept below `models`, by what is in them; it may not be there yet.

    Args:
        memo: of tensors' digests. progress: bytes of the transformer read and to be read.

    Raises: as `fuse_lora`, for the checkpoint and for files that are not there.
    """
    check_loras(loras)
    opened = open_checkpoint(checkpoint, (COMPONENT,))
    digests = digest_tensors(opened.tensors[COMPONENT].values(), memo, progress)
    # The place too: the folder's links lead there.
    inputs = [_FORMAT, str(opened.root.resolve()), digests, [[digest_lora(file), s] for file, s in loras]]
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]
    # The folder's own name is the model's name.
    return models / "lora" / key / opened.name.rpartition("/")[2]


def is_fused(folder: Path) -> bool:
    """Whether a folder that `fused_folder` names is there, and everything that it links to."""
    return (folder / RECORD).is_file() and all(path.exists() for path in folder.rglob("*"))


def fuse_once(checkpoint: Path, loras: Sequence[Lora], folder: Path, progress: OnBytes | None = None) -> Path:
    """Make the checkpoint that `fused_folder` names, where it is not there yet; errors as `fuse_lora`."""
    if is_fused(folder):
        return folder
    if (folder / RECORD).is_file():  # the checkpoint's files have moved since
        shutil.rmtree(folder)
    try:
        # Symbolic: a hard link would look like a change to whoever is reading the checkpoint now.
        return fuse_lora(checkpoint, loras, folder, progress, links="symbolic").folder
    except UsageError:
        # Another process may have finished the same folder meanwhile.
        if is_fused(folder):
            return folder
        raise


def read_record(folder: Path) -> dict[str, Any]:
    """Which LoRAs are in a checkpoint that `fuse_lora` wrote; empty for any other."""
    try:
        record = read_object_file(folder / RECORD)
    except (OSError, IntegrityError):
        return {}
    return record if isinstance(record.get("lora"), list) else {}


def check_loras(loras: Sequence[Lora]) -> None:
    """Raise UsageError for no LoRA at all and for a strength that is no finite number."""
    if not loras:
        raise UsageError("no LoRA was named; give at least one, as FILE or FILE:STRENGTH")
    for file, strength in loras:
        if not math.isfinite(strength):
            raise UsageError(f"--lora {file}: strength {strength} is not finite; 1 is as trained, 0.8 is weaker")


def _check_fits(lora: LoraFile, piece: Piece, checkpoint: Checkpoint) -> None:
    refs = checkpoint.tensors[COMPONENT]
    ref = refs.get(piece.tensor)
    if ref is None:
        near = ", ".join(difflib.get_close_matches(piece.tensor, refs, 3))
        raise CheckpointError(
            f"{lora.file} changes {piece.tensor}, which the transformer of {checkpoint.name} has not"
            f"{f' (near are {near})' if near else ''}; it is for another model"
        )
    if _as_matrix(ref) != piece.shape:
        raise CheckpointError(
            f"{lora.file} changes {piece.tensor} as {list(piece.shape)}, in {checkpoint.name} it is {list(ref.shape)}; "
            "it is for another model, or a control LoRA, which needs wider inputs than FluxPipeline has"
        )
    if ref.dtype not in FLOAT_DTYPES:
        raise CheckpointError(
            f"{piece.tensor} of {checkpoint.name} is stored as {ref.dtype}, LoRAs are fused into "
            f"{', '.join(FLOAT_DTYPES)}; give a checkpoint in BF16"
        )


def _as_matrix(ref: TensorRef) -> tuple[int, int]:
    return (ref.shape[0], math.prod(ref.shape[1:])) if ref.shape else (1, 1)


def _shard_names(checkpoint: Checkpoint) -> dict[str, Path]:
    """The transformer's weight files by their path in the folder."""
    wanted = {ref.file for ref in checkpoint.tensors[COMPONENT].values()}
    found = {f"{COMPONENT}/{path.name}": path.resolve() for path in (checkpoint.root / COMPONENT).iterdir()}
    return {name: path for name, path in sorted(found.items()) if path in wanted}


def _linked_files(checkpoint: Checkpoint, touched: set[Path]) -> dict[str, Path]:
    """What the new folder takes over, by its path there: no hidden files, and no other forms of the old weights."""
    root, contents = checkpoint.root, open_contents(checkpoint.root)
    index = contents.read_json("model_index.json")
    named = [name for name, entry in index.items() if isinstance(entry, list) and name != COMPONENT]
    folders = [root / name for name in named if Path(name).name == name]
    found = [path for path in root.iterdir() if path.suffix not in _WEIGHTS and path.name != RECORD]
    found += [path for path in (root / COMPONENT).iterdir() if path.suffix not in _WEIGHTS]
    found += [path for folder in (*folders, root / "vae_tiny") if folder.is_dir() for path in folder.rglob("*")]
    shown = [path for path in found if path.is_file() and not path.name.startswith(".")]
    linked = {name: contents.file(name) for name in (str(path.relative_to(root)) for path in shown)}
    linked |= {name: path for name, path in _shard_names(checkpoint).items() if path not in touched}
    return dict(sorted(linked.items()))


def _link(source: Path, target: Path, links: Links) -> bool:
    """Make `target` the file `source`; True if it had to be copied."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if links == "symbolic":
        target.symlink_to(source)
        return False
    try:
        os.link(source, target)
    except OSError:  # another file system, one without hard links, or a file that is not ours
        shutil.copyfile(source, target)
        return True
    return False


def _write_shard(
    source: Path,
    target: Path,
    refs: Sequence[TensorRef],
    changes: Mapping[str, Sequence[tuple[Piece, float]]],
    count: Callable[[int], None],
) -> None:
    """Copy a shard, but for the tensors that change; places and header stay the same."""
    position, end = 0, source.stat().st_size
    with source.open("rb", buffering=0) as old, target.open("wb") as new:
        for ref in sorted((ref for ref in refs if ref.name in changes), key=lambda ref: ref.offset):
            _copy(old, new, position, ref.offset, count)
            for rows in _fused_rows(old, ref, changes[ref.name]):
                new.write(rows)
                count(len(rows))
            position = ref.offset + ref.nbytes
        _copy(old, new, position, end, count)
        new.flush()
        os.fsync(new.fileno())


def _fused_rows(old: Any, ref: TensorRef, changes: Sequence[tuple[Piece, float]]) -> Iterator[memoryview]:
    """The bytes of a tensor with its changes, some rows at a time; a view is good until the next one."""
    import torch

    dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[ref.dtype]
    height, width = _as_matrix(ref)
    step = max(1, _BLOCK_ITEMS // max(width, 1))
    for start in range(0, height, step):
        stop = min(start + step, height)
        block = torch.empty(stop - start, width, dtype=dtype)
        old.seek(ref.offset + start * width * block.element_size())
        read_into(old, _bytes_of(block), ref)
        values = block.to(torch.float32)
        for piece, strength in changes:
            added = piece.up_OR[start:stop] @ piece.down_RI
            if piece.replaces:
                values = added
            else:
                values += added.mul_(strength * piece.scale)
        fused = values.to(dtype)
        if not torch.isfinite(fused).all():
            raise CheckpointError(
                f"{ref.name} has a NaN or Inf in {ref.dtype} with the LoRAs in it; use a smaller strength"
            )
        yield _bytes_of(fused)


def _bytes_of(tensor: Tensor) -> memoryview:
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _copy(old: Any, new: Any, start: int, stop: int, count: Callable[[int], None]) -> None:
    old.seek(start)
    while start < stop:
        block = old.read(min(stop - start, _BLOCK_BYTES))
        if not block:
            raise CheckpointError(
                f"{old.name} ends at byte {start}, it had {stop}; start again when nothing writes to it"
            )
        new.write(block)
        count(len(block))
        start += len(block)


def _write_record(
    path: Path,
    checkpoint: Checkpoint,
    loras: Sequence[tuple[LoraFile, float]],
    changes: Mapping[str, Sequence[tuple[Piece, float]]],
) -> None:
    before = read_record(checkpoint.root)
    record = {
        "checkpoint": checkpoint.name,
        "lora": [
            *before.get("lora", ()),
            *({"file": lora.file.name, "sha256": lora.sha256, "strength": strength} for lora, strength in loras),
        ],
        "tensors": sorted({*changes, *before.get("tensors", ())}),
    }
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
