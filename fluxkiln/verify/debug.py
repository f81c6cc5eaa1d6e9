"""Where inside a part the error starts: its values compared one by one, rung by rung, and what to do about the first.

The rungs are those of the ladder that can be looked into: of all parts the template against upstream's own modules and
the stored weights against the checkpoint's, then the compiled forms that the target's toolchain knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

from fluxkiln.build.budget import name_shapes
from fluxkiln.build.prepared import Prepared
from fluxkiln.build.verification import record
from fluxkiln.compile.toolchain import toolchain_of
from fluxkiln.errors import UsageError
from fluxkiln.patches.pipeline import fill_rows
from fluxkiln.progress import Progress, Silent
from fluxkiln.types import find_part
from fluxkiln.verify.findings import Culprit, RecordedCall, RungFindings


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All rungs of a part, from the bottom; `step` is -1 where the part runs once."""

    part: str
    kind: str
    scheme: str
    step: int
    rungs: tuple[RungFindings, ...]
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def culprit(self) -> Culprit | None:
        """That of the lowest bad rung."""
        return next((rung.culprit for rung in self.rungs if rung.culprit is not None), None)

    def to_json(self) -> dict[str, Any]:
        """The diagnosis as plain JSON."""
        return {
            **{name: getattr(self, name) for name in ("part", "kind", "scheme", "step")},
            **self.facts,
            "culprit": asdict(self.culprit) if self.culprit else None,
            "rungs": [
                {"rung": rung.rung, "against": rung.against, "values": [asdict(finding) for finding in rung.findings]}
                for rung in self.rungs
            ],
        }


def debug_part(prepared: Prepared, name: str, step: int = 0, progress: Progress | None = None) -> Diagnosis:
    """Look into the part called `name` at every rung, on what it is given at denoising step `step`.

    Raises:
        UsageError: no such part or step, or a part that cannot be looked into; whatever recording or compiling raises.
    """
    progress = progress or Silent()
    plan = prepared.plan
    part = find_part(plan.parts, name)

    @cache
    def recorded() -> RecordedCall:
        progress.stage("record", 1)
        recording = record(prepared)
        progress.done("record", "reference run", f"{recording.steps} step(s)")
        if not 0 <= step < recording.steps:
            raise UsageError(
                f"step {step} was not recorded, there are 0 to {recording.steps - 1}; --steps gives the reference run "
                "more of them"
            )
        place = step if part.traits.each_step else 0  # what runs once has one step
        inputs, _ = fill_rows(part, recording.inputs(part.name, place))
        return RecordedCall(inputs, recording.outputs(part.name, place), recording.shapes, prepared.plan.bundle)

    found = toolchain_of(plan.target).look(prepared.checkpoint, plan, prepared.cache, part, recorded, progress)
    facts = {"shapes": name_shapes(recorded().shapes), **found.facts}
    shown = step if part.traits.each_step else -1
    return Diagnosis(part.name, part.kind, plan.scheme(part).name, shown, found.rungs, facts)
