"""Which file goes to which device, what it takes there, and whether all of it fits.

A file takes its weights, its instructions (of every net, the runtime loads them per net) and the run-time memory of its
largest net, which its nets share. Files need not all be there at once: the text encoders have done their work before
the first step, and so have the parts that turn the timesteps into modulation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fluxkiln.compile.plan import Binary, Plan
from fluxkiln.errors import ResourceError
from fluxkiln.types import Part

# In the order in which an image needs them.
PHASES = ("encode", "modulate", "denoise", "decode")
MODULATION_FILE = "modulation.bmodel"
# of components; all others are text encoders
_PHASES = {"transformer": "denoise", "vae": "decode"}
# A BM1684X system has no more devices behind one host than this.
MAX_DEVICES = 8
# How the files are loaded -> the phases whose files are on the device at once.
RESIDENT: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "everything resident": (PHASES,),
    "text encoders and modulation released": (("encode",), ("modulate",), ("denoise", "decode")),
    "one phase at a time": tuple((phase,) for phase in PHASES),
}


@dataclass(frozen=True, slots=True)
class FileMemory:
    """What one file takes on its device, in bytes."""

    file: str
    device: int
    phase: str
    weights: int
    instructions: int
    runtime: int

    @property
    def total(self) -> int:
        return self.weights + self.instructions + self.runtime


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """Files on devices. `budget` is what one device gives to models, in bytes."""

    files: tuple[FileMemory, ...]
    budget: int

    @property
    def devices(self) -> int:
        return max(file.device for file in self.files) + 1

    def peak(self, device: int, way: str) -> int:
        """The most that is on a device at once, loaded in one of the ways of RESIDENT."""
        return max(self.held(device, phases) for phases in RESIDENT[way])

    def held(self, device: int, phases: Sequence[str]) -> int:
        """What the files of these phases take together on a device."""
        return sum(file.total for file in self.files if file.device == device and file.phase in phases)

    def best_way(self) -> str | None:
        """The way to load with the fewest loads that fits every device; None when none does."""
        for way in RESIDENT:
            if all(self.peak(device, way) <= self.budget for device in range(self.devices)):
                return way
        return None

    def to_json(self) -> dict[str, Any]:
        """Files, and the peak of every device for each way to load."""
        rows = [
            {
                "file": file.file,
                "device": file.device,
                "phase": file.phase,
                "weights": file.weights,
                "instructions": file.instructions,
                "runtime": file.runtime,
                "total": file.total,
            }
            for file in self.files
        ]
        peaks = {way: [self.peak(device, way) for device in range(self.devices)] for way in RESIDENT}
        denoising = [self.held(device, ("denoise",)) for device in range(self.devices)]
        return {
            "files": rows,
            "budget": self.budget,
            "peaks": {**peaks, "while denoising": denoising},
            "load": self.best_way(),
        }

    def table(self) -> str:
        """The plan as text, in GB."""
        lines = [f"{'file':28}{'device':>7}{'weights':>9}{'instr.':>8}{'runtime':>9}{'GB':>8}"]
        lines += [
            f"{file.file:28}{file.device:>7}{file.weights / 1e9:>9.3f}{file.instructions / 1e9:>8.3f}"
            f"{file.runtime / 1e9:>9.3f}{file.total / 1e9:>8.3f}"
            for file in self.files
        ]
        for way in RESIDENT:
            for device in range(self.devices):
                peak = self.peak(device, way)
                fits = "fits" if peak <= self.budget else f"over {self.budget / 1e9:.3f}"
                lines.append(f"{way:52}{device:>3}{peak / 1e9:>14.3f} {fits}")
        return "\n".join(lines)


def group_parts(plan: Plan, binaries: Sequence[Binary]) -> dict[str, list[Binary]]:
    """File of the bundle -> the parts whose nets it holds.

    One per component, one for the modulation; a transformer that is too large for one device is cut into one per
    device, as few as fit.
    """
    groups: dict[str, list[Binary]] = {}
    for binary in binaries:
        groups.setdefault(file_of(binary.part), []).append(binary)
    placed: dict[str, list[Binary]] = {}
    for name, members in groups.items():
        runs = [members] if name != "transformer.bmodel" else _fewest_runs(plan, members)
        for index, run in enumerate(runs):
            placed[name if len(runs) == 1 else f"transformer.{index}.bmodel"] = run
    return placed


def file_of(part: Part) -> str:
    """The file of the bundle that a part's net is in, when its component fits one device."""
    if is_modulation(part):
        return MODULATION_FILE
    return f"{part.component}{'_decoder' * part.traits.convolutional}.bmodel"


def is_modulation(part: Part) -> bool:
    """Whether a part runs once per image, before the loop, for all steps."""
    return bool(part.traits.rows)


def plan_devices(plan: Plan, groups: Mapping[str, Sequence[Binary]]) -> DevicePlan:
    """What every file takes, from the facts of its nets.

    Raises:
        ResourceError: no way to load the files fits the device; `details` is the table.
    """
    laid = lay_files(plan, groups)
    if laid.best_way() is None:
        largest = max(laid.files, key=lambda file: file.total)
        error = ResourceError(
            f"{largest.file} takes {largest.total / 1e9:.2f} GB, a {plan.target.name} gives "
            f"{laid.budget / 1e9:.2f} GB to models; choose a smaller SCHEME (W4BF16), SIZE or VAE=tiny"
        )
        error.details = laid.table()
        raise error
    return laid


def lay_files(plan: Plan, groups: Mapping[str, Sequence[Binary]]) -> DevicePlan:
    """The plan, whether it fits or not."""
    files = []
    for name, members in groups.items():
        phase = "modulate" if is_modulation(members[0].part) else _PHASES.get(members[0].part.component, "encode")
        stem = name.split(".")
        device = int(stem[1]) if stem[1].isdigit() else 0
        files.append(FileMemory(name, device, phase, *_memory(members)))
    return DevicePlan(tuple(files), plan.target.device_bytes)


def split_devices(parts: list[Binary], devices: int) -> list[list[Binary]]:
    """Cut a chain of parts into at most `devices` runs whose largest is as small as possible, by measured bytes."""
    sizes = [int(part.facts["weight_bytes"]) + int(part.facts["instruction_bytes"]) for part in parts]
    low, high = max(sizes), sum(sizes)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_runs(sizes, middle)) <= devices else (middle + 1, high)
    return [[parts[index] for index in run] for run in _runs(sizes, low)]


def _memory(members: Sequence[Binary]) -> tuple[int, int, int]:
    """Weights, instructions, run-time memory of the nets of one file."""
    return (
        sum(int(binary.facts["weight_bytes"]) for binary in members),
        sum(int(binary.facts["instruction_bytes"]) for binary in members),
        max(int(binary.facts["runtime_bytes"]) for binary in members),
    )


def _fewest_runs(plan: Plan, whole: list[Binary]) -> list[list[Binary]]:
    """A chain of parts on as few devices as hold it, or on all there can be."""
    runs = [whole]
    for devices in range(1, MAX_DEVICES + 1 if plan.target.device_bytes else 1):
        runs = split_devices(whole, devices)
        if _fits(runs, plan):
            break
    return runs


def _fits(runs: list[list[Binary]], plan: Plan) -> bool:
    return all(sum(_memory(run)) <= plan.target.device_bytes for run in runs)


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
