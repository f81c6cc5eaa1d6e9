"""Whether the files of a checkpoint are still the ones whose headers were read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fluxkiln.errors import CheckpointError
from fluxkiln.export.safetensors_header import read_header
from fluxkiln.types import TensorRef

_AGAIN = "run the same command again when nothing writes to the checkpoint"


@dataclass(frozen=True, slots=True)
class ShardState:
    """A file at a moment. Its ctime is left out: giving the file another name changes that."""

    size: int
    mtime_ns: int
    device: int
    inode: int


def shard_states(refs: Iterable[TensorRef]) -> dict[Path, ShardState]:
    """The state of every file that holds one of the tensors; CheckpointError names one that cannot be found."""
    return {file: _state(file) for file in dict.fromkeys(ref.file for ref in refs)}


def check_unchanged(states: Mapping[Path, ShardState], refs: Iterable[TensorRef]) -> None:
    """Raise CheckpointError when a file is not what it was, or has one of the tensors no longer where it was."""
    for file, before in states.items():
        now = _state(file)
        if now != before:
            what = "was replaced" if now.inode != before.inode or now.device != before.device else "was written to"
            raise CheckpointError(f"{file} {what} meanwhile, it must stay as it is; {_AGAIN}")
    places: dict[Path, set[tuple[int, int, str, tuple[int, ...]]]] = {}
    for ref in refs:
        if ref.file not in places:
            places[ref.file] = {_place(one) for one in read_header(ref.file).values()}
        if _place(ref) not in places[ref.file]:
            raise CheckpointError(f"{ref.file} has {ref.name} no longer at byte {ref.offset}; {_AGAIN}")


def _state(file: Path) -> ShardState:
    try:
        stat = file.stat()
    except OSError as error:
        raise CheckpointError(
            f"shard {file} has gone ({error.strerror}), it must stay until the end; put it back and {_AGAIN}"
        ) from error
    return ShardState(stat.st_size, stat.st_mtime_ns, stat.st_dev, stat.st_ino)


def _place(ref: TensorRef) -> tuple[int, int, str, tuple[int, ...]]:
    return ref.offset, ref.nbytes, ref.dtype, ref.shape
