"""Which file goes to which device, what it takes there and whether all of it fits; how long an image would take.

A file takes its weights, its instructions (of every net, the runtime loads them per net) and the run-time memory of its
largest net, which its nets share. Files need not all be there at once: the text encoders have done their work before
the first step, and so have the parts that turn the timesteps into modulation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from fluxkiln.compile.plan import Binary, Plan
from fluxkiln.errors import ResourceError
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.types import Part

# In the order in which an image needs them.
PHASES = ("encode", "modulate", "denoise", "decode")
MODULATION_FILE = "modulation.bmodel"
# of components; all others are text encoders
_PHASES = {"transformer": "denoise", "vae": "decode"}
# Where what a net takes is known from, the surest last: from nothing but its weights, from the table of nets that were
# measured, from a mould of the store.
ORIGINS = ("weights", "measured", "compiled")
# How the files are loaded -> the phases whose files are on the device at once.
RESIDENT: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "everything resident": (PHASES,),
    "text encoders and modulation released": (("encode",), ("modulate",), ("denoise", "decode")),
    "one phase at a time": tuple((phase,) for phase in PHASES),
}
_ESTIMATE_LABEL = (
    "Summed from the schedules that the compiler makes of its own code, net after net; no board ran. It ranks "
    "formulations, it does not measure them."
)


@dataclass(frozen=True, slots=True)
class FileMemory:
    """What one file takes on its device, in bytes; `origin`, of ORIGINS, is that of the net of which least is known."""

    file: str
    device: int
    phase: str
    weights: int
    instructions: int
    runtime: int
    origin: str = ORIGINS[-1]

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
        fits = (way for way in RESIDENT if all(self.peak(one, way) <= self.budget for one in range(self.devices)))
        return next(fits, None)

    def to_json(self) -> dict[str, Any]:
        """Files, and the peak of every device for each way to load. What is not known is None, and a peak whose file
        has it is the least that it can be."""
        rows = []
        for file in self.files:
            unknown = dict.fromkeys(("instructions", "runtime") if file.origin == ORIGINS[0] else ())
            rows.append({**asdict(file), **unknown, "total": file.total})
        peaks = {way: [self.peak(device, way) for device in range(self.devices)] for way in RESIDENT}
        peaks["while denoising"] = [self.held(device, ("denoise",)) for device in range(self.devices)]
        origin = min((file.origin for file in self.files), key=ORIGINS.index)
        load = self.best_way()
        closest = load or list(RESIDENT)[-1]
        return {
            "files": rows, "budget": self.budget, "peaks": peaks, "load": load, "closest": closest, "origin": origin
        }  # fmt: skip

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
    groups: dict[str, list[Binary]] = defaultdict(list)
    for binary in binaries:
        groups[file_of(binary.part)].append(binary)
    placed: dict[str, list[Binary]] = {}
    for name, members in groups.items():
        runs = [members] if name != "transformer.bmodel" else _fewest_runs(plan, members)
        for index, run in enumerate(runs):
            placed[name if len(runs) == 1 else f"transformer.{index}.bmodel"] = run
    return placed


def find_owners(binaries: Sequence[Binary]) -> dict[str, str]:
    """Net -> the first of these nets that has its weights: a part at several sizes whose moulds have the same map.

    Where the moulds are not known it is taken for granted, but of convolutions: there it is not so.
    """
    first: dict[object, str] = {}
    owners = {}
    for binary in binaries:
        blob, part = binary.blobs.get("map"), binary.part
        alike = (part.base, blob.digest) if blob else part.base
        known = blob is not None or (binary.made == "planned" and not part.traits.convolutional)
        owners[binary.net] = first.setdefault(alike, binary.net) if known else binary.net
    return owners


def file_of(part: Part) -> str:
    """The file of the bundle that a part's net is in, when its component fits one device."""
    if part.traits.rows:  # once per image, before the loop, for all steps
        return MODULATION_FILE
    return f"{part.component}{'_decoder' * part.traits.convolutional}.bmodel"


def device_of(file: str) -> int:
    """The device that a file of the bundle goes to, counted from the first one's: N for `transformer.N.bmodel`."""
    number = file.split(".")[1]
    return int(number) if number.isdigit() else 0


def plan_devices(plan: Plan, groups: Mapping[str, Sequence[Binary]]) -> DevicePlan:
    """What every file takes, from the facts of its nets; ResourceError, its `details` a table, where no way fits."""
    laid = lay_files(plan, groups)
    if laid.best_way() is None:
        # the least that has to be there at once, where it is most
        together = product(range(laid.devices), list(RESIDENT.values())[-1])
        device, phases = max(together, key=lambda one: laid.held(*one))
        names = [file.file for file in laid.files if file.device == device and file.phase in phases]
        error = ResourceError(
            f"{' and '.join(names)} {'take' if names[1:] else 'takes'} {laid.held(device, phases) / 1e9:.2f} GB"
            f"{' together' * bool(names[1:])}, a {plan.target.name} gives "
            f"{laid.budget / 1e9:.2f} GB to models; choose a smaller SCHEME (W4BF16), SIZE or VAE=tiny, "
            f"{'fewer sizes, ' * bool(plan.further)}or a board with more of it or more chips (--board, "
            "--device-memory, --devices)"
        )
        error.details = laid.table()
        raise error
    return laid


def lay_files(plan: Plan, groups: Mapping[str, Sequence[Binary]]) -> DevicePlan:
    """The plan, whether it fits or not."""
    files = []
    for name, members in groups.items():
        phase = "modulate" if name == MODULATION_FILE else _PHASES.get(members[0].part.component, "encode")
        origin = min((binary.facts.get("origin", ORIGINS[-1]) for binary in members), key=ORIGINS.index)
        files.append(FileMemory(name, device_of(name), phase, *_memory(members), origin))
    return DevicePlan(tuple(files), plan.target.device_bytes)


def split_devices(nets: list[Binary], devices: int) -> list[list[Binary]]:
    """Cut a chain of parts, each at all its sizes, into at most `devices` runs whose largest is as small as possible,
    by measured bytes."""
    members: dict[str, list[Binary]] = defaultdict(list)
    for net in nets:
        members[net.part.base].append(net)
    parts = list(members.values())
    sizes = [sum(_memory(part)[:2]) for part in parts]
    low, high = max(sizes), sum(sizes)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_runs(parts, sizes, middle)) <= devices else (middle + 1, high)
    return _runs(parts, sizes, low)


def _runs(parts: list[list[Binary]], sizes: list[int], limit: int) -> list[list[Binary]]:
    runs: list[list[Binary]] = [[]]
    used = 0
    for part, size in zip(parts, sizes, strict=True):
        if runs[-1] and used + size > limit:
            runs.append([])
            used = 0
        runs[-1] += part
        used += size
    return runs


def _memory(members: Sequence[Binary]) -> tuple[int, int, int]:
    """Weights, each once, instructions, run-time memory of the nets of one file."""
    owners = find_owners(members)
    weights = [int(binary.facts["weight_bytes"]) for binary in members if owners[binary.net] == binary.net]
    instructions, runtime = (
        [int(binary.facts[name]) for binary in members] for name in ("instruction_bytes", "runtime_bytes")
    )
    return sum(weights), sum(instructions), max(runtime)


def _fewest_runs(plan: Plan, whole: list[Binary]) -> list[list[Binary]]:
    """A chain of parts on as few devices as hold it, or on all there can be."""
    runs = [whole]
    for devices in range(1, plan.target.devices + 1 if plan.target.device_bytes else 1):
        runs = split_devices(whole, devices)
        if all(sum(_memory(run)) <= plan.target.device_bytes for run in runs):
            break
    return runs


def report_devices(checkpoint: Checkpoint, plan: Plan, binaries: Sequence[Binary]) -> dict[str, Any]:
    """The report's facts `memory`, `devices` and `estimate`; nothing for a target without devices."""
    if not plan.target.device_bytes:
        return {}
    laid = plan_devices(plan, group_parts(plan, binaries)).to_json()
    memory = {
        file["file"]: {what: file[what] for what in ("weights", "instructions", "runtime")} for file in laid["files"]
    }
    devices = {"budget": laid["budget"], "load": laid["load"], "peaks": laid["peaks"]}
    return {"memory": memory, "devices": devices, "estimate": _report_estimate(*estimate(checkpoint, binaries))}


def estimate(checkpoint: Checkpoint, binaries: Sequence[Binary]) -> tuple[dict[str, Any], list[str]]:
    """`estimate_pipeline` of an image of the first size with the model's own number of steps; not of one that lacks a
    component."""
    first = {binary.part for binary in binaries if binary.part.name == binary.part.base}
    parts = {binary.part: binary.facts.get("estimate_ms") for binary in binaries if binary.part in first}
    values, missing = estimate_pipeline(parts, checkpoint.model.steps[checkpoint.variant])
    whole = {part.component for part in parts} == {*checkpoint.model.components}
    return (values if whole else {**values, "image_ms": None}), missing


def plan_files(checkpoint: Checkpoint, plan: Plan, binaries: Sequence[Binary]) -> dict[str, Any]:
    """`DevicePlan.to_json`; `devices` it may be spread over, and the compiler's `estimate` as `estimate_pipeline`."""
    laid = lay_files(plan, group_parts(plan, binaries))
    values, _ = estimate(checkpoint, binaries)
    told = {name: values[name] for name in ("steps", "step_ms", "once_ms", "image_ms")}
    if any(binary.facts.get("origin") == ORIGINS[0] for binary in binaries):  # the sum would be too small
        told |= {"image_ms": None, "once_ms": None}
    return {**laid.to_json(), "devices": plan.target.devices, "estimate": told}


def estimate_pipeline(parts: Mapping[Part, float | None], steps: int) -> tuple[dict[str, Any], list[str]]:
    """What an image takes when parts that depend on the step run once a step, and everything else once.

    Args:
        parts: part -> ms of one run; None where there is no estimate.
        steps: denoising steps.

    Returns:
        `once_ms` of the parts that run once an image; `step_ms` and `image_ms`, None when there is no part of the step
        or one has no estimate: the sum would be too small; `by_kind`: how many `parts` of it have an estimate, and
        their summed `ms`. Then the names of the parts that have none.
    """
    spent = {False: 0.0, True: 0.0}
    by_kind: dict[str, dict[str, Any]] = {}
    for part, ms in parts.items():
        if ms is not None:
            spent[part.traits.each_step] += ms
            known = by_kind.setdefault(part.kind, {"parts": 0, "ms": 0.0})
            known["parts"] += 1
            known["ms"] += ms
    missing = [part for part, ms in parts.items() if ms is None]
    stepped = [part for part in parts if part.traits.each_step]
    step = None if not stepped or {*stepped} & {*missing} else spent[True]
    image = None if step is None else spent[False] + steps * step
    values = {"steps": steps, "step_ms": step, "once_ms": spent[False], "image_ms": image, "by_kind": by_kind}
    return values, [part.name for part in missing]


def _report_estimate(values: Mapping[str, Any], missing: Sequence[str]) -> dict[str, Any]:
    """The compiler's estimate per kind, per step and per image, as text for people and as numbers for programs."""
    entries: dict[str, str] = {}
    for kind, known in values["by_kind"].items():
        count, each = known["parts"], f"{known['ms'] / known['parts']:.3f} ms"
        entries |= {f"{count} x {kind}": f"{each} each"} if count > 1 else {kind: each}
    entries["one step"] = _duration(values["step_ms"])
    entries["once an image"] = _duration(values["once_ms"])
    entries[f"an image of {values['steps']} steps"] = _duration(values["image_ms"])
    if missing:
        entries["without an estimate"] = ", ".join(missing)
    return {"label": _ESTIMATE_LABEL, "entries": entries, "values": values}


def _duration(ms: float | None) -> str:
    if ms is None:
        return "unknown"
    return f"{ms / 1000:.3f} s" if ms >= 1000 else f"{ms:.3f} ms"
