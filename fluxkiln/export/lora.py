"""LoRAs in a checkpoint: as it is opened, so that whoever reads a tensor gets it changed; or written to a folder.

See `export.change`. What is written are the bytes that are read. Untouched files are links, touched shards streamed.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fluxkiln.documents import read_object_file
from fluxkiln.errors import CheckpointError, IntegrityError, UsageError
from fluxkiln.export.change import Change, Piece
from fluxkiln.export.checkpoint import Checkpoint, bytes_of, find_model, open_checkpoint, read_blocks
from fluxkiln.export.contents import open_contents
from fluxkiln.export.fingerprint import check_unchanged, shard_states
from fluxkiln.export.folders import check_destination, whole_or_nothing
from fluxkiln.export.lora_file import read_lora
from fluxkiln.progress import OnBytes, byte_counter
from fluxkiln.types import TensorRef

# A LoRA's file and its strength.
Lora = tuple[Path, float]

RECORD = "lora.json"
_WEIGHTS = (".safetensors", ".sft", ".gguf", ".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".onnx")
_BLOCK_BYTES = 4 << 20
# of a tensor at once: every core has it five times, in float32
_MEASURED = 1 << 20


@dataclass(frozen=True, slots=True)
class Fused:
    """A checkpoint with LoRAs in it: its folder, the tensors that differ, bytes of new files, what was not found."""

    folder: Path
    tensors: tuple[str, ...]
    nbytes: int
    loras: tuple[Mapping[str, Any], ...]


def with_loras(checkpoint: Checkpoint, loras: Sequence[Lora]) -> Checkpoint:
    """The checkpoint with LoRAs in the tensors of the components that were opened; no weight of it is read.

    Args:
        loras: files and strengths; a file may come more than once.

    Raises:
        UsageError: no such file, a strength that is no number. CheckpointError: as `read_lora`.
    """
    if not loras:
        return checkpoint
    check_loras(loras)
    files = {file: read_lora(file, checkpoint) for file, _ in loras}
    found: dict[tuple[str, str], list[tuple[str, float, Piece]]] = {}
    for file, strength in loras:
        for piece in files[file].pieces:
            found.setdefault((piece.component, piece.tensor), []).append((files[file].sha256, strength, piece))
    tensors = {component: dict(refs) for component, refs in checkpoint.tensors.items()}
    for (component, name), uses in found.items():
        change = Change(tuple(use[:2] for use in uses), tuple(piece for _, _, piece in uses))
        tensors[component][name] = replace(tensors[component][name], change=change)
    facts = (
        {
            "file": file.name,
            "sha256": files[file].sha256,
            "strength": strength,
            "tensors": len(files[file].pieces),
            "missing": list(files[file].missing),
        }
        for file, strength in loras
    )
    return replace(checkpoint, tensors=tensors, loras=tuple(facts))


def changed_tensors(checkpoint: Checkpoint) -> list[tuple[str, TensorRef]]:
    """Component and tensor of all that LoRAs change."""
    every = ((component, ref) for component, refs in checkpoint.tensors.items() for ref in refs.values())
    return [(component, ref) for component, ref in every if ref.change]


def measure_changes(checkpoint: Checkpoint) -> dict[str, tuple[float, float]]:
    """By component and tensor, `transformer/proj_out.weight` say: the length of the stored tensor, and of what LoRAs
    add to it, as it is rounded. Every changed number is read, and is finite; CheckpointError otherwise."""
    import numpy as np

    def measure(ref: TensorRef) -> tuple[float, float]:
        lengths = np.zeros(2)
        for stored, changed in zip(read_blocks(ref.stored, _MEASURED), read_blocks(ref, _MEASURED), strict=True):
            before = stored.astype(np.float32).reshape(-1)
            added = changed.astype(np.float32).reshape(-1) - before
            lengths += np.dot(before, before), np.dot(added, added)
        return math.sqrt(lengths[0]), math.sqrt(lengths[1])

    found = changed_tensors(checkpoint)
    with ThreadPoolExecutor(os.cpu_count() or 1, "measure") as pool:
        lengths = pool.map(measure, (ref for _, ref in found))
        return {f"{component}/{ref.name}": one for (component, ref), one in zip(found, lengths, strict=True)}


def fuse_lora(checkpoint: Path, loras: Sequence[Lora], destination: Path, progress: OnBytes | None = None) -> Fused:
    """Write `checkpoint` with the LoRAs in it to `destination`, which is there whole or not at all.

    Memory: what a few of the LoRAs' matrices take in float32, and 20 MB.

    Args:
        checkpoint: a folder in the diffusers layout; it is only read.
        loras: files and strengths; a file may come more than once.
        destination: a folder that does not exist or is empty; hard links in it are copies where the file system has
            none, so that nothing of `checkpoint` is needed later.

    Raises:
        UsageError: no such file, a strength that is no number, `destination` has something in it.
        CheckpointError: no checkpoint; no LoRA, or none for this checkpoint; a result that is not finite.
        ResourceError: not enough room on the disk.
    """
    check_destination(destination)
    check_loras(loras)
    there = tuple(name for name in find_model(checkpoint).components if (checkpoint / name).is_dir())
    opened = with_loras(open_checkpoint(checkpoint, there), loras)
    refs = [ref for _, ref in changed_tensors(opened)]
    states = shard_states(refs)
    linked = _linked_files(opened, states)
    parent = next(path for path in destination.absolute().parents if path.exists())
    apart = [path for path in linked.values() if path.stat().st_dev != parent.stat().st_dev]
    written = sum(state.size for state in states.values())
    total = written + sum(path.stat().st_size for path in apart)
    count = byte_counter(total, progress)
    with whole_or_nothing(destination, total, "choose another folder") as folder:
        for name, path in linked.items():
            if _link(path, folder / name):
                count(path.stat().st_size if path in apart else 0)
        for name, path in _shard_names(opened).items():
            if path in states:
                _write_shard(path, folder / name, [ref for ref in refs if ref.file == path], count)
        check_unchanged(states, refs)
        _write_record(folder / RECORD, opened)
    return Fused(destination, tuple(sorted(ref.name for ref in refs)), written, opened.loras)


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


def _shard_names(checkpoint: Checkpoint) -> dict[str, Path]:
    """The weight files of components by their path in the folder."""
    wanted = {ref.file for refs in checkpoint.tensors.values() for ref in refs.values()}
    folders = ((name, checkpoint.root / name) for name in checkpoint.tensors)
    found = {f"{name}/{path.name}": path.resolve() for name, folder in folders for path in folder.iterdir()}
    return {name: path for name, path in sorted(found.items()) if path in wanted}


def _linked_files(checkpoint: Checkpoint, touched: Collection[Path]) -> dict[str, Path]:
    """What the new folder takes over, by its path there: no hidden files, and no other forms of the old weights."""
    root, contents = checkpoint.root, open_contents(checkpoint.root)
    changed = {component for component, _ in changed_tensors(checkpoint)}
    index = contents.read_json("model_index.json")
    named = [name for name, entry in index.items() if isinstance(entry, list) and name not in changed]
    folders = [root / name for name in named if Path(name).name == name]
    found = [path for path in root.iterdir() if path.suffix not in _WEIGHTS and path.name != RECORD]
    found += [path for name in changed for path in (root / name).iterdir() if path.suffix not in _WEIGHTS]
    found += [path for folder in (*folders, root / "vae_tiny") if folder.is_dir() for path in folder.rglob("*")]
    shown = [path for path in found if path.is_file() and not path.name.startswith(".")]
    linked = {name: contents.file(name) for name in (str(path.relative_to(root)) for path in shown)}
    linked |= {name: path for name, path in _shard_names(checkpoint).items() if path not in touched}
    return dict(sorted(linked.items()))


def _link(source: Path, target: Path) -> bool:
    """Make `target` the file `source`; True if it had to be copied."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system, one without hard links, or a file that is not ours
        shutil.copyfile(source, target)
        return True
    return False


def _write_shard(source: Path, target: Path, refs: Sequence[TensorRef], count: Callable[[int], None]) -> None:
    """Copy a shard, but for the tensors that change; places and header stay the same."""
    position, end = 0, source.stat().st_size
    with source.open("rb", buffering=0) as old, target.open("wb") as new:
        for ref in sorted(refs, key=lambda ref: ref.offset):
            _copy(old, new, position, ref.offset, count)
            for block in read_blocks(ref):
                new.write(bytes_of(block))
                count(block.nbytes)
            position = ref.offset + ref.nbytes
        _copy(old, new, position, end, count)
        new.flush()
        os.fsync(new.fileno())


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


def _write_record(path: Path, checkpoint: Checkpoint) -> None:
    before = read_record(checkpoint.root)
    record = {
        "checkpoint": checkpoint.name,
        "lora": lora_facts(checkpoint)["lora"],
        "tensors": sorted({*(ref.name for _, ref in changed_tensors(checkpoint)), *before.get("tensors", ())}),
    }
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def lora_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """`lora`: file name, sha256 and strength of each LoRA in a checkpoint, fused before or read, or nothing."""
    used = [{key: one[key] for key in ("file", "sha256", "strength")} for one in checkpoint.loras]
    loras = [*read_record(checkpoint.root).get("lora", ()), *used]
    return {"lora": loras} if loras else {}
