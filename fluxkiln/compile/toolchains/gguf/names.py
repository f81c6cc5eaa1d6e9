"""The names, joints and swapped halves of a file held against diffusers' own converter, without a weight.

What reads a file back undoes what wrote it, and would undo a mistake as well. So every row of every tensor gets a
number, goes where the file has it, and through diffusers' converter to the name it has there: it must be back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fluxkiln.compile.plan import Plan
from fluxkiln.compile.tensors import part_refs
from fluxkiln.compile.toolchains.gguf.file import LAYOUTS, layout_of, plan_file
from fluxkiln.export.checkpoint import Checkpoint

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fluxkiln.verify.ladder import Ladder

RUNG = "named"


def compare_names(ladder: Ladder, checkpoint: Checkpoint, plan: Plan) -> None:
    """A row for each part of a component that diffusers has a converter for."""
    import numpy as np

    for folder in dict.fromkeys(part.folder for part in plan.parts if part.folder in LAYOUTS):
        if not layout_of(checkpoint, folder).stretch:
            continue
        numbers, found = number_rows(checkpoint, folder), convert_rows(checkpoint, plan, folder)
        for part in (part for part in plan.parts if part.folder == folder):
            names = [ref.name for ref in part_refs(checkpoint, plan, part)]
            there = [found.get(name, np.zeros_like(numbers[name])) for name in names]
            actual, reference = np.concatenate(there), np.concatenate([numbers[name] for name in names])
            ladder.compare(
                part.name, part.traits, "rows", -1, reference, None, [(RUNG, _fit(actual, reference))],
                plan.scheme(part).base_name,
            )  # fmt: skip


def number_rows(checkpoint: Checkpoint, folder: str) -> dict[str, NDArray[Any]]:
    """Tensor -> a number for each of its rows, from 1; no two rows of the component share one."""
    import numpy as np

    numbers, end = {}, 1
    for name, ref in checkpoint.tensors[folder].items():
        numbers[name] = np.arange(end, end + ref.shape[0], dtype=np.float64)
        end += ref.shape[0]
    return numbers


def convert_rows(checkpoint: Checkpoint, plan: Plan, folder: str) -> dict[str, NDArray[Any]]:
    """The same numbers by diffusers' names, after its converter has made these of the file's."""
    import numpy as np
    import torch
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    numbers, stretch = number_rows(checkpoint, folder), layout_of(checkpoint, folder).stretch
    state = {}
    for one in plan_file(checkpoint, plan, folder):
        rows = np.concatenate([numbers[part.ref.name][part.start : part.stop] for part in one.rows])
        state[one.name] = torch.from_numpy(np.repeat(rows, stretch))
    convert = SINGLE_FILE_LOADABLE_CLASSES[checkpoint.model.classes[folder]]["checkpoint_mapping_fn"]
    converted = convert(checkpoint=state, config=dict(checkpoint.configs[folder]))
    return {name: tensor.numpy()[::stretch] for name, tensor in converted.items()}


def _fit(actual: NDArray[Any], reference: NDArray[Any]) -> NDArray[Any]:
    """As many numbers as there should be, 0 for what is missing."""
    import numpy as np

    fitted = np.zeros_like(reference)
    fitted[: len(actual)] = actual[: len(reference)]
    return fitted
