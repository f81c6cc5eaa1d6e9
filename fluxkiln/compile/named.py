"""Names, joints and swapped halves of files held against another program's own table of names, without a weight.

What reads a file back undoes what wrote it, and would undo a mistake as well. So every row of every tensor gets a
number, goes where the file has it, and through the other program's table: each has to be where that looks for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fluxkiln.compile.plan import Plan
from fluxkiln.compile.repacked import FileTensor
from fluxkiln.compile.repacker import NAMED
from fluxkiln.compile.tensors import part_refs
from fluxkiln.export.checkpoint import Checkpoint

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fluxkiln.verify.ladder import Ladder

# tensor -> a number for each of its rows, from 1; no two rows of a component share one
Numbers = dict[str, "NDArray[Any]"]


def number_rows(checkpoint: Checkpoint, folder: str) -> Numbers:
    """Those of a folder of the checkpoint."""
    import numpy as np

    numbers, end = {}, 1
    for name, ref in checkpoint.tensors[folder].items():
        numbers[name] = np.arange(end, end + ref.shape[0], dtype=np.float64)
        end += ref.shape[0]
    return numbers


def file_rows(numbers: Numbers, tensors: Iterable[FileTensor]) -> Numbers:
    """The same where a file has them."""
    import numpy as np

    return {
        one.name: np.concatenate([numbers[rows.ref.name][rows.start : rows.stop] for rows in one.rows])
        for one in tensors
    }


def diffusers_rows(checkpoint: Checkpoint, folder: str, tensors: Sequence[FileTensor], stretch: int) -> Numbers:
    """The rows of a file by diffusers' names, after its converter has made these of the file's; see `OtherLayout`."""
    import numpy as np
    import torch
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    there = file_rows(number_rows(checkpoint, folder), tensors)
    state = {name: torch.from_numpy(np.repeat(rows, stretch)) for name, rows in there.items()}
    convert = SINGLE_FILE_LOADABLE_CLASSES[checkpoint.model.classes[folder]]["checkpoint_mapping_fn"]
    converted = convert(checkpoint=state, config=dict(checkpoint.configs[folder]))
    return {name: tensor.numpy()[::stretch] for name, tensor in converted.items()}


def found_rows(numbers: Numbers, here: Numbers, there: Numbers, odd: Iterable[str] = ()) -> Numbers:
    """The rows by the checkpoint's names, 0 for one that a file has (`here`) where the other program (`there`) has not.

    Args:
        odd: tensors that the other program cannot use though it knows their names.
    """
    import numpy as np

    none = np.zeros(0)
    names = {name for name in here.keys() | there.keys()
             if not np.array_equal(here.get(name, none), there.get(name, none))}  # fmt: skip
    lost = [of[name] for name in names | set(odd) for of in (here, there) if name in of]
    numbered = np.concatenate([none, *lost])
    return {name: np.where(np.isin(rows, numbered), 0.0, rows) for name, rows in numbers.items()}


def compare_rows(ladder: Ladder, checkpoint: Checkpoint, plan: Plan, folder: str, found: Mapping[str, Any]) -> None:
    """A row of the report for each part of a folder: `found` has to be the checkpoint's own rows, in its order."""
    import numpy as np

    numbers = number_rows(checkpoint, folder)
    for part in (part for part in plan.parts if part.folder == folder):
        names = [ref.name for ref in part_refs(checkpoint, plan, part)]
        actual = np.concatenate([found.get(name, np.zeros_like(numbers[name])) for name in names])
        reference = np.concatenate([numbers[name] for name in names])
        ladder.compare(
            part.name, part.traits, "rows", -1, reference, None, [(NAMED.name, _fit(actual, reference))],
            plan.scheme(part).base_name,
        )  # fmt: skip


def _fit(actual: NDArray[Any], reference: NDArray[Any]) -> NDArray[Any]:
    """As many numbers as there should be, 0 for what is missing."""
    import numpy as np

    fitted = np.zeros_like(reference)
    fitted[: len(actual)] = actual[: len(reference)]
    return fitted
