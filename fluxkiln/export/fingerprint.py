"""Content keys of checkpoint tensors, remembered by file, the search for NaN and Inf, and whether files have changed.

Every byte is hashed once; later calls answer from a memo while the file's size, times and inode stay the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.errors import CheckpointError, ResourceError
from fluxkiln.export.safetensors_header import ITEM_BYTES, read_header, read_into
from fluxkiln.files import write_durably
from fluxkiln.progress import OnBytes
from fluxkiln.types import TensorRef

if TYPE_CHECKING:
    from fluxkiln.export.checkpoint import Checkpoint


_CHUNK_BYTES = 8 << 20
# A file written this recently could change again with its times unchanged (2 s: the coarsest clock of a file system).
_SETTLE_NS = 2_000_000_000
_MEMO_FORMAT = 1
_AGAIN = "run the same command again when nothing writes to the checkpoint"


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """What one pass over a tensor's bytes tells: its digest, and the flat index of the first NaN or Inf, or -1."""

    sha256: str
    first_nonfinite: int


class DigestMemo:
    """Facts of tensors that were read before, kept in a JSON file; a damaged or lost file costs time only."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files: dict[str, dict[str, Any]] = {}
        self._changed = False
        # A memo that cannot be read is an empty memo.
        with suppress(OSError, ValueError, KeyError):
            stored = json.loads(path.read_bytes())
            if isinstance(stored, dict) and stored.get("format") == _MEMO_FORMAT and isinstance(stored["files"], dict):
                self._files = stored["files"]

    def lookup(self, ref: TensorRef, state: list[int]) -> TensorFacts | None:
        """The facts of `ref` if they were recorded for this very state of its file."""
        entry = self._files.get(str(ref.file))
        facts = entry["tensors"].get(_memo_key(ref)) if entry and entry["state"] == state else None
        return TensorFacts(*facts) if facts else None

    def record(self, ref: TensorRef, state: list[int], facts: TensorFacts) -> None:
        """Remember the facts of `ref`, unless its file is so new that it may still change unnoticed."""
        if time.time_ns() - max(state[1:3]) < _SETTLE_NS:
            return
        entry = self._files.get(str(ref.file))
        if entry is None or entry["state"] != state:
            entry = self._files[str(ref.file)] = {"state": state, "tensors": {}}
        entry["tensors"][_memo_key(ref)] = [facts.sha256, facts.first_nonfinite]
        self._changed = True

    def save(self) -> None:
        """Write the memo if it changed; of two writers the last wins, and no reader sees half a file."""
        if not self._changed:
            return
        self._files = {file: entry for file, entry in self._files.items() if os.path.exists(file)}
        # A memo that cannot be written costs time at the next call, nothing else.
        with suppress(OSError, ResourceError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_durably(self._path, json.dumps({"format": _MEMO_FORMAT, "files": self._files}).encode())
        self._changed = False


def digest_tensors(
    refs: Iterable[TensorRef], memo: DigestMemo | None = None, progress: OnBytes | None = None
) -> dict[str, str]:
    """sha256 of each tensor's dtype, shape and bytes, by tensor name.

    Args:
        refs: tensors of one component (names are unique there).
        memo: answers for files that did not change; new facts are added and saved.
        progress: called with bytes done and bytes in all.

    Raises:
        CheckpointError: a file is shorter than its header said, or changes while it is read.
    """
    return {ref.name: facts.sha256 for ref, facts in _read_facts(refs, memo, progress).items()}


def scan_finite(refs: Iterable[TensorRef], memo: DigestMemo | None = None, progress: OnBytes | None = None) -> None:
    """Raise CheckpointError at the first tensor with a NaN or Inf, with its name and index; arguments as above."""
    for ref, facts in _read_facts(refs, memo, progress).items():
        if facts.first_nonfinite >= 0:
            index, rest = [], facts.first_nonfinite
            for size in reversed(ref.shape):
                index.append(rest % size)
                rest //= size
            raise CheckpointError(
                f"{ref.name} in {ref.file} is NaN or Inf at {index[::-1]}, weights must be finite; the checkpoint is "
                f"damaged or its training diverged: fetch it again or use another"
            )


def file_states(checkpoint: Checkpoint) -> dict[Path, tuple[int, ...]]:
    """Size, times and inode of every weight file of a checkpoint.

    Raises:
        CheckpointError: one has disappeared.
    """
    files = {ref.file for refs in checkpoint.tensors.values() for ref in refs.values()}
    return {file: tuple(_file_state(file)) for file in sorted(files)}


def check_states(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError when a weight file is not what it was when the checkpoint's bytes were read."""
    for file, state in file_states(checkpoint).items():
        if checkpoint.states.get(file) != state:
            raise CheckpointError(
                f"{file} changed while the build read it, and a build is of one checkpoint; start again when nothing "
                "writes to it"
            )


def fingerprint(checkpoint: Checkpoint, memo: DigestMemo | None = None, progress: OnBytes | None = None) -> str:
    """sha256 over all that determines what a checkpoint computes: configs, tokenizers, scheduler, every tensor.

    It does not depend on where the folder lies nor on how tensors are spread over shards.
    """
    digest = hashlib.sha256()
    for component in sorted(checkpoint.configs):
        config = json.dumps(checkpoint.configs[component], sort_keys=True)
        digest.update(f"config {component} {config}\n".encode())
    for name, path in sorted(checkpoint.sidecars.items()):
        digest.update(f"file {name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    all_refs = [ref for refs in checkpoint.tensors.values() for ref in refs.values()]
    facts = _read_facts(all_refs, memo, progress)
    for component in sorted(checkpoint.tensors):
        for name, ref in sorted(checkpoint.tensors[component].items()):
            digest.update(f"tensor {component} {name} {facts[ref].sha256}\n".encode())
    return digest.hexdigest()


def _memo_key(ref: TensorRef) -> str:
    return f"{ref.offset} {ref.dtype} {','.join(map(str, ref.shape))}"


def _file_state(file: Path) -> list[int]:
    try:
        stat = file.stat()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}; fetch it again") from error
    # ctime as well: copying tools restore mtime, nobody sets ctime.
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]


def _read_facts(
    refs: Iterable[TensorRef], memo: DigestMemo | None, progress: OnBytes | None
) -> dict[TensorRef, TensorFacts]:
    by_file: dict[Path, list[TensorRef]] = {}
    for ref in refs:
        by_file.setdefault(ref.file, []).append(ref)
    facts: dict[TensorRef, TensorFacts] = {}
    for file, members in by_file.items():
        state = _file_state(file)
        for ref in members:
            if memo and (known := memo.lookup(ref, state)):
                facts[ref] = known
    total = sum(ref.nbytes for members in by_file.values() for ref in members if ref not in facts)
    done = 0
    # Hashing and reading leave the interpreter lock alone: the cores share the tensors of a file.
    with ThreadPoolExecutor(os.cpu_count() or 1, "read") as pool:
        for file, members in by_file.items():
            unknown = sorted((ref for ref in members if ref not in facts), key=lambda ref: ref.offset)
            if not unknown:
                continue
            state = _file_state(file)
            reading = [pool.submit(_read_one, ref) for ref in unknown]
            try:
                for ref, read in zip(unknown, reading, strict=True):
                    facts[ref] = read.result()
                    done += ref.nbytes
                    if progress:
                        progress(done, total)
            finally:
                for read in reading:
                    read.cancel()
            if state != _file_state(file):
                raise CheckpointError(f"{file} changed while it was read; start again when nothing writes to it")
            if memo:
                for ref in unknown:
                    memo.record(ref, state, facts[ref])
    if memo:
        memo.save()
    return facts


def _read_one(ref: TensorRef) -> TensorFacts:
    try:
        with ref.file.open("rb", buffering=0) as stream:
            return _read_stream(stream, ref)
    except OSError as error:
        raise CheckpointError(f"{ref.file} cannot be read: {error.strerror}; fetch it again") from error


def _read_stream(stream: FileIO, ref: TensorRef) -> TensorFacts:
    import numpy as np

    from fluxkiln.export.finite import first_nonfinite

    digest = hashlib.sha256(f"{ref.dtype} {list(ref.shape)}\n".encode())
    chunk = np.empty(min(_CHUNK_BYTES, ref.nbytes), np.uint8)
    found, done = -1, 0
    stream.seek(ref.offset)
    while done < ref.nbytes:
        view = chunk[: ref.nbytes - done]
        read_into(stream, view.data, ref)
        digest.update(view.data)
        if found < 0:
            index = first_nonfinite(view, ref.dtype)
            found = index + done // ITEM_BYTES[ref.dtype] if index >= 0 else -1
        done += view.nbytes
    return TensorFacts(digest.hexdigest(), found)


def shard_states(refs: Iterable[TensorRef]) -> dict[Path, os.stat_result]:
    """The state of every file that holds one of the tensors; CheckpointError names one that cannot be found."""
    return {file: _stat_shard(file) for file in dict.fromkeys(ref.file for ref in refs)}


def check_unchanged(states: Mapping[Path, os.stat_result], refs: Iterable[TensorRef]) -> None:
    """Raise CheckpointError when a file is not what it was, or has one of the tensors no longer where it was."""
    for file, before in states.items():
        now = _stat_shard(file)
        # not its ctime: giving the file another name changes that
        replaced = (now.st_ino, now.st_dev) != (before.st_ino, before.st_dev)
        if replaced or (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            what = "was replaced" if replaced else "was written to"
            raise CheckpointError(f"{file} {what} meanwhile, it must stay as it is; {_AGAIN}")
    headers: dict[Path, set[TensorRef]] = {}
    for ref in refs:
        if ref.file not in headers:
            headers[ref.file] = {replace(one, name="") for one in read_header(ref.file).values()}
        # a component may call it otherwise than its file
        if replace(ref, name="") not in headers[ref.file]:
            raise CheckpointError(f"{ref.file} has {ref.name} no longer at byte {ref.offset}; {_AGAIN}")


def _stat_shard(file: Path) -> os.stat_result:
    try:
        return file.stat()
    except OSError as error:
        raise CheckpointError(
            f"shard {file} has gone ({error.strerror}), it must stay until the end; put it back and {_AGAIN}"
        ) from error
