"""Where a training has got to, on disk: adapters, the optimizer's moments, losses; whole or not there.

`<output>/state/<update>/` is written beside its place and renamed. The one before it is removed when the first loss
after it was a number: until then nobody knows that it is good. A kill at any moment leaves one of them whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.errors import IntegrityError
from fluxkiln.files import disk_full_named, partial_directory, remove_unheld, sync_directory

if TYPE_CHECKING:
    from torch import Tensor

STATE, TENSORS, FACTS = "state", "state.safetensors", "state.json"


@dataclass(slots=True)
class TrainingState:
    """What a run goes on with.

    Attributes:
        update: steps of the optimizer that are done. losses: the mean loss of each.
        facts: what has to be the same when the run goes on.
        tensors: empty at the beginning.
    """

    facts: dict[str, Any]
    update: int = 0
    losses: list[float] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)


def save_state(output: Path, state: TrainingState, tensors: Mapping[str, Tensor]) -> None:
    """Write the state of a run beside those before it. ResourceError: the disk is full."""
    from safetensors.torch import save_file

    parent = output / STATE
    parent.mkdir(parents=True, exist_ok=True)
    remove_unheld(parent)
    final = parent / f"{state.update:07d}"
    with disk_full_named(parent), partial_directory(parent, ".state") as partial:
        save_file({name: one.contiguous() for name, one in tensors.items()}, partial / TENSORS)
        kept = {"update": state.update, "losses": state.losses, "facts": state.facts}
        (partial / FACTS).write_text(json.dumps(kept) + "\n", encoding="utf-8")
        for name in (TENSORS, FACTS):
            with (partial / name).open("rb") as file:
                os.fsync(file.fileno())
        sync_directory(partial)
        if final.exists():  # a run that goes on writes the state it began with again
            shutil.rmtree(final)
        partial.rename(final)
        sync_directory(parent)


def keep_state(output: Path, good: bool) -> None:
    """The newest state turned out to be good, and those before it go; or not, and it goes itself."""
    found = _states(output)
    for folder in found[:-1] if good else found[-1:]:
        shutil.rmtree(folder)


def load_state(output: Path) -> TrainingState | None:
    """The newest state of a run, without its tensors; None where there is none. See `load_tensors`.

    Raises: IntegrityError: it is damaged.
    """
    found = _states(output)
    if not found:
        return None
    try:
        kept = json.loads((found[-1] / FACTS).read_bytes())
        return TrainingState(dict(kept["facts"]), int(kept["update"]), [float(loss) for loss in kept["losses"]])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"{found[-1]} is damaged ({type(error).__name__}); remove it to begin anew, or name another --output-dir"
        ) from error


def load_tensors(output: Path, state: TrainingState) -> dict[str, Tensor]:
    """Adapters and moments of a state by name. IntegrityError: the file is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = output / STATE / f"{state.update:07d}" / TENSORS
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise IntegrityError(
            f"{path} is damaged ({error}); remove {path.parent} to begin anew, or name another --output-dir"
        ) from error


def _states(output: Path) -> list[Path]:
    folder = output / STATE
    return sorted(path for path in folder.glob("[0-9]*") if path.is_dir()) if folder.is_dir() else []
