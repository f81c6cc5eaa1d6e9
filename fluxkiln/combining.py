"""Parts into the files of a bundle: one per component, or one per device where a component is too large for one."""

from __future__ import annotations

from fluxkiln.progress import FROM_STORE, Progress
from fluxkiln.stages import BinaryPart, CombinedFile, Kiln, combine_parts


def combine_components(kiln: Kiln, binaries: tuple[BinaryPart, ...], progress: Progress) -> tuple[CombinedFile, ...]:
    """One bmodel per component; an unquantized transformer is cut into a file per device."""
    groups = group_parts(kiln, binaries)
    progress.stage("combine", len(groups))
    files = []
    for name, parts in groups.items():
        files.append(combine_parts(kiln, name, parts))
        progress.done("combine", name, FROM_STORE if files[-1].hit else f"{len(parts)} nets")
    return tuple(files)


def group_parts(kiln: Kiln, binaries: tuple[BinaryPart, ...]) -> dict[str, list[BinaryPart]]:
    """File of the bundle -> the parts whose nets it holds."""
    groups: dict[str, list[BinaryPart]] = {}
    for binary in binaries:
        component = binary.part.component
        groups.setdefault("vae_decoder.bmodel" if component == "vae" else f"{component}.bmodel", []).append(binary)
    if not any(kiln.schemes[kind].weight_bits for kind in ("double", "single")):
        whole = groups.pop("transformer.bmodel")
        for index, chunk in enumerate(split_devices(whole, UNQUANTIZED_DEVICES)):
            groups[f"transformer.{index}.bmodel"] = chunk
    return groups


# 23.8 GB of 16-bit weights on chips of 16 GB, of which the runtime and activations need a part
UNQUANTIZED_DEVICES = 3


def split_devices(parts: list[BinaryPart], devices: int) -> list[list[BinaryPart]]:
    """Cut a chain of parts into at most `devices` runs whose largest is as small as possible, by measured bytes."""
    sizes = [int(part.facts["weight_bytes"]) + int(part.facts["instruction_bytes"]) for part in parts]
    low, high = max(sizes), sum(sizes)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_runs(sizes, middle)) <= devices else (middle + 1, high)
    return [[parts[index] for index in run] for run in _runs(sizes, low)]


def _runs(sizes: list[int], limit: int) -> list[list[int]]:
    runs: list[list[int]] = [[]]
    used = 0
    for index, size in enumerate(sizes):
        if runs[-1] and used + size > limit:
            runs.append([])
            used = 0
        runs[-1].append(index)
        used += size
    return runs
