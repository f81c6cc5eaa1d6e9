"""Content keys of checkpoint tensors, remembered by file, the search for NaN and Inf, and whether files have changed.

Every byte is hashed once; later calls answer from a memo while the file's size, times and inode stay the same. What
has but another ctime is read again: a second name elsewhere is no change.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.errors import CheckpointError, ResourceError
from fluxkiln.export.safetensors_header import ITEM_BYTES, read_header, read_into
from fluxkiln.files import FileState, file_state, write_durably
from fluxkiln.progress import OnBytes
from fluxkiln.types import TensorRef

if TYPE_CHECKING:
    from fluxkiln.export.checkpoint import Checkpoint


_CHUNK_BYTES = 8 << 20
# A file written this recently could change again with its times unchanged (2 s: the coarsest clock of a file system).
_SETTLE_NS = 2_000_000_000
_MEMO_FORMAT = 1
# Of a file, times to read it when its ctime moves meanwhile: two readings that agree are the file's content.
_READINGS = 2
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

    def lookup(self, ref: TensorRef, state: FileState) -> TensorFacts | None:
        """The facts of `ref` if they were recorded for this very state of its file."""
        entry = self._files.get(str(ref.file))
        facts = entry["tensors"].get(_memo_key(ref)) if entry and entry["state"] == list(state) else None
        return TensorFacts(*facts) if facts else None

    def record(self, ref: TensorRef, state: FileState, facts: TensorFacts) -> None:
        """Remember the facts of `ref`, unless its file is so new that it may still change unnoticed."""
        if time.time_ns() - max(state.mtime_ns, state.ctime_ns) < _SETTLE_NS:
            return
        entry = self._files.get(str(ref.file))
        if entry is None or entry["state"] != list(state):
            entry = self._files[str(ref.file)] = {"state": list(state), "tensors": {}}
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


def file_states(checkpoint: Checkpoint) -> dict[Path, FileState]:
    """Size, times and inode of every weight file of a checkpoint.

    Raises:
        CheckpointError: one has disappeared.
    """
    files = {ref.file for refs in checkpoint.tensors.values() for ref in refs.values()}
    return {file: _state_of(file) for file in sorted(files)}


def unread_bytes(checkpoint: Checkpoint, memo: DigestMemo) -> int:
    """Bytes of a checkpoint's tensors that no memo tells the digest of; errors as `file_states`."""
    states = file_states(checkpoint)
    refs = (ref for refs in checkpoint.tensors.values() for ref in refs.values())
    return sum(ref.nbytes for ref in refs if memo.lookup(ref, states[ref.file]) is None)


def check_states(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError when a weight file is not what it was when the checkpoint's bytes were read.

    One whose ctime alone moved is read again.
    """
    for file, state in file_states(checkpoint).items():
        before = checkpoint.states.get(file)
        if state != before and not (before and state.is_same_file(before) and _has_same_bytes(checkpoint, file, state)):
            raise CheckpointError(
                f"{file} changed while the build read it, and a build is of one checkpoint; start again when nothing "
                "writes to it"
            )


_read_again: dict[tuple[Path, FileState], dict[TensorRef, str]] = {}
_reading = threading.Lock()


def _has_same_bytes(checkpoint: Checkpoint, file: Path, state: FileState) -> bool:
    """Whether a file has the tensors that the checkpoint was found to have, by reading it, once for each state."""
    with _reading:
        if (file, state) not in _read_again:
            refs = [ref for refs in checkpoint.tensors.values() for ref in refs.values() if ref.file == file]
            _read_again[file, state] = {ref: facts.sha256 for ref, facts in _read_facts(refs, None, None).items()}
    found = _read_again[file, state]
    return all(
        found[ref] == checkpoint.digests[component][name]
        for component, refs in checkpoint.tensors.items()
        for name, ref in refs.items()
        if ref.file == file
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


def _state_of(file: Path) -> FileState:
    try:
        return file_state(file)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}; fetch it again") from error


def _read_facts(
    refs: Iterable[TensorRef], memo: DigestMemo | None, progress: OnBytes | None
) -> dict[TensorRef, TensorFacts]:
    """What is stored is read; the digest of a changed tensor follows from that of the stored one."""
    refs = list(refs)
    facts = _read_stored_facts((ref.stored for ref in refs), memo, progress)
    return {
        ref: replace(facts[ref.stored], sha256=ref.change.digest(facts[ref.stored].sha256))
        if ref.change
        else facts[ref]
        for ref in refs
    }


def _read_stored_facts(
    refs: Iterable[TensorRef], memo: DigestMemo | None, progress: OnBytes | None
) -> dict[TensorRef, TensorFacts]:
    by_file: dict[Path, list[TensorRef]] = {}
    for ref in refs:
        by_file.setdefault(ref.file, []).append(ref)
    facts: dict[TensorRef, TensorFacts] = {}
    for file, members in by_file.items():
        state = _state_of(file)
        for ref in members:
            if memo and (known := memo.lookup(ref, state)):
                facts[ref] = known
    total = sum(ref.nbytes for members in by_file.values() for ref in members if ref not in facts)
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress:
            progress(done, total)

    # Hashing and reading leave the interpreter lock alone: the cores share the tensors of a file.
    with ThreadPoolExecutor(os.cpu_count() or 1, "read") as pool:
        for file, members in by_file.items():
            unknown = sorted((ref for ref in members if ref not in facts), key=lambda ref: ref.offset)
            if not unknown:
                continue
            state, found = _read_file(pool, file, unknown, count)
            facts |= found
            if memo:
                for ref in unknown:
                    memo.record(ref, state, facts[ref])
    if memo:
        memo.save()
    return facts


def _read_file(
    pool: ThreadPoolExecutor, file: Path, refs: list[TensorRef], count: Callable[[int], None]
) -> tuple[FileState, dict[TensorRef, TensorFacts]]:
    """The facts of tensors of one file, and the state in which it has them; `count` is told of each one's bytes."""
    before: dict[TensorRef, TensorFacts] = {}
    for turn in range(_READINGS):
        state = _state_of(file)
        reading = [pool.submit(_read_one, ref) for ref in refs]
        found = {}
        try:
            for ref, read in zip(refs, reading, strict=True):
                found[ref] = read.result()
                count(0 if turn else ref.nbytes)
        finally:
            for read in reading:
                read.cancel()
        now = _state_of(file)
        if now == state or (now.is_same_file(state) and found == before):
            return now, found
        if not now.is_same_file(state):
            break
        before = found
    raise CheckpointError(f"{file} changed while it was read; start again when nothing writes to it")


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


def shard_states(refs: Iterable[TensorRef]) -> dict[Path, FileState]:
    """The state of every file that holds one of the tensors; CheckpointError names one that cannot be found."""
    return {file: _stat_shard(file) for file in dict.fromkeys(ref.file for ref in refs)}


def check_unchanged(states: Mapping[Path, FileState], refs: Iterable[TensorRef]) -> None:
    """Raise CheckpointError when a file is not what it was, or has one of the tensors no longer where it was."""
    for file, before in states.items():
        now = _stat_shard(file)
        if not now.is_same_file(before):
            replaced = (now.inode, now.device) != (before.inode, before.device)
            what = "was replaced" if replaced else "was written to"
            raise CheckpointError(f"{file} {what} meanwhile, it must stay as it is; {_AGAIN}")
    headers: dict[Path, set[TensorRef]] = {}
    for ref in refs:
        if ref.file not in headers:
            headers[ref.file] = {replace(one, name="") for one in read_header(ref.file).values()}
        # a component may call it otherwise than its file
        if replace(ref.stored, name="") not in headers[ref.file]:
            raise CheckpointError(f"{ref.file} has {ref.name} no longer at byte {ref.offset}; {_AGAIN}")


def _stat_shard(file: Path) -> FileState:
    try:
        return file_state(file)
    except OSError as error:
        raise CheckpointError(
            f"shard {file} has gone ({error.strerror}), it must stay until the end; put it back and {_AGAIN}"
        ) from error
