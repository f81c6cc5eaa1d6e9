"""A part's values in a graph of a bundle, as ONNX Runtime runs it."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.artifacts.actions import ActionCache
from fluxkiln.compile.plan import Plan
from fluxkiln.compile.rungs import STAGE, OpenPart, check_form, look_below, open_part, tell_rung
from fluxkiln.compile.templates import make_template
from fluxkiln.compile.weights import part_packers
from fluxkiln.export.bindings import bind_part, weight_reader
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.progress import Progress
from fluxkiln.types import Part
from fluxkiln.verify.findings import PartFindings, Record, RungFindings, Values
from fluxkiln.verify.judgement import F32

if TYPE_CHECKING:
    from numpy.typing import NDArray


def look(
    checkpoint: Checkpoint, plan: Plan, cache: ActionCache, part: Part, record: Record, progress: Progress
) -> PartFindings:
    """See `Toolchain.look`."""
    from fluxkiln.compile.onnx.linked import link_parts

    call = record()
    alone = replace(plan, shapes=call.shapes, parts=(part,))
    progress.stage(STAGE, 3)
    opened = open_linked(checkpoint, alone, cache, part, call.inputs)
    rungs = look_below(opened, checkpoint, progress)
    with tempfile.TemporaryDirectory(prefix="fluxkiln-look-") as scratch:
        (graph,) = link_parts(checkpoint, alone, cache, Path(scratch) / "graphs").values()
        rungs.append(check_linked(opened, graph))
    tell_rung(rungs[-1], progress)
    return PartFindings(tuple(rungs))


def open_linked(checkpoint: Checkpoint, plan: Plan, cache: ActionCache, part: Part, inputs: Values) -> OpenPart:
    """The part with every weight as a linked graph holds it: product by product in codes, others as they are."""
    import numpy as np

    from fluxkiln.compile.onnx.runner import Filling
    from fluxkiln.compile.onnx.values import quantized_regions

    scheme, template = plan.scheme(part), make_template(checkpoint, plan.of(part), cache, part.kind, "onnx23")
    if not scheme.weight_bits:
        return open_part(checkpoint, plan, part, template, inputs, None)
    reader = weight_reader(bind_part(part, template.slots, checkpoint), checkpoint)
    regions = quantized_regions(template.path, [spec.name for spec in template.slots])
    packer_of = part_packers(checkpoint, plan, cache, part, "onnx23")

    def stored(slot: str) -> NDArray[Any]:
        weight = np.array(reader(slot), np.float32)
        for region in () if scheme.keeps(slot) else regions.get(slot, ()):
            start, stop, _ = region[1].indices(weight.shape[1])
            weight[region] = packer_of(slot, (start, stop))(weight[region]).dequantize(scheme.group_size)
        return weight

    return open_part(checkpoint, plan, part, template, inputs, Filling(template, stored))


def check_linked(opened: OpenPart, graph: Path) -> RungFindings:
    """A graph of the bundle against the template with the stored weights."""
    from fluxkiln.compile.onnx.values import graph_values

    run = partial(graph_values, graph, opened.inputs)
    # the same numbers on both sides, whatever the scheme: 5e-7 was measured
    return check_form(opened, "executed", F32, run, {})
