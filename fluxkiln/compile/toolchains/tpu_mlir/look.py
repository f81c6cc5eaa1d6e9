"""A part's values in the compiler's lowered graph, and its stored bytes read back.

A chip's binary shows its outputs only; the weights in it, where the bundle is there, are read back byte by byte.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.artifacts.actions import ActionCache
from fluxkiln.compile.plan import Binary, Plan
from fluxkiln.compile.rungs import STAGE, OpenPart, check_form, dequantized_rung, look_below, open_part, tell_rung
from fluxkiln.compile.templates import find_template, make_template
from fluxkiln.compile.toolchains.tpu_mlir.environment import installed
from fluxkiln.compile.toolchains.tpu_mlir.moulds import cast_part, compile_part, find_mould, make_mould
from fluxkiln.compile.toolchains.tpu_mlir.rungs import compare_part, lay_out_lowered
from fluxkiln.compile.toolchains.tpu_mlir.simulator import Simulator
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.progress import Progress
from fluxkiln.types import Part
from fluxkiln.verify.findings import Advice, Operation, PartFindings, Record, RungFindings, Values
from fluxkiln.verify.judgement import BF16, F16, F32, Shares, judge_stored, tolerance_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

TOLERANCES = {"F32": F32, "F16": F16, "*": BF16}
_FORGET = "forget the mould (`fluxkiln cache gc --results`)"
_ADVICE = Advice(
    keep_sinusoids="keep Sin, Cos and all that feeds them in F32 through the quantize table (f32_table, "
    "CompileJob.keep_f32), or ",
    keep="keep it and what feeds it in F32 through the quantize table, or ",
    rebuild=f"the rung `stored` of the report reads the weights back; {_FORGET} and build again with --prove",
    recompile=f"{_FORGET} and compile again",
)
_LOCATION = re.compile(r'^(#loc\d*) = loc\("(.*)"\)$', re.MULTILINE)
_LINE = re.compile(r'"(?P<name>tpu\.\w+)"\(.*?\) (?P<attributes>\{.*?\} )?: .* loc\((?P<loc>#loc\d*)\)$', re.MULTILINE)
_EPSILON = re.compile(r"\beps = ([0-9.E+-]+)")


def look(
    checkpoint: Checkpoint, plan: Plan, cache: ActionCache, part: Part, record: Record, progress: Progress
) -> PartFindings:
    """See `Toolchain.look`."""
    call, env = record(), installed()
    small = replace(plan, shapes=call.shapes)
    progress.stage(STAGE, 3)
    opened = open_stored(checkpoint, small, cache, part, call.inputs)
    rungs = look_below(opened, checkpoint, progress)
    if env is not None:
        with (
            tempfile.TemporaryDirectory(prefix="fluxkiln-look-") as scratch,
            Simulator(env, plan.target.chip, plan.logs / "debug.log") as simulator,
        ):
            lowered = _lay_out(checkpoint, small, cache, part, Path(scratch) / "lowered")
            rungs.append(check_lowered(opened, lowered, simulator))
    stored = _read_back(opened, checkpoint, plan, cache, call.bundle)
    rungs += [stored] if stored is not None else []
    tell_rung(rungs[-1], progress)
    missing = "not looked into: its interpreter is TPU-MLIR's, which is not installed here"
    return PartFindings(tuple(rungs), {} if env is not None else {"lowered graph": missing})


def open_stored(checkpoint: Checkpoint, plan: Plan, cache: ActionCache, part: Part, inputs: Values) -> OpenPart:
    """The part with every weight as the compiled form holds it."""
    from fluxkiln.compile.onnx.runner import TemplateRunner

    rung = dequantized_rung(checkpoint, plan, cache)
    assert isinstance(rung, TemplateRunner)
    template = make_template(checkpoint, plan, cache, part.kind, "onnx17")
    opened = open_part(checkpoint, plan, part, template, inputs, rung.fill(part.name).read_weight)
    return replace(opened, advice=_ADVICE)


def _lay_out(checkpoint: Checkpoint, plan: Plan, cache: ActionCache, part: Part, folder: Path) -> Path:
    """The part's lowered graph, its weights beside it."""
    template = make_template(checkpoint, plan, cache, part.kind, "onnx17")
    mould = make_mould(checkpoint, plan, cache, template)
    binary = cast_part(plan, part, mould) if mould.castable else compile_part(checkpoint, plan, cache, part, template)
    lay_out_lowered(checkpoint, plan, cache, binary, folder)
    # as the compiler wrote it: in groups of heads the scores have names of their own
    lowered = folder / "lowered.mlir"
    lowered.write_text(cache.path(binary.blobs["lowered"]).read_text())
    return lowered


def _read_back(
    opened: OpenPart, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, bundle: Path
) -> RungFindings | None:
    """The part's weights in the build's own bundle; None where there is no bundle, or nothing was cast."""
    from fluxkiln.artifacts.bundle import read_manifest

    if not (bundle / "manifest.json").is_file():
        return None
    part = opened.part
    entry = next((one for one in read_manifest(bundle).parts if one.name == part.name), None)
    template = find_template(checkpoint, plan, cache, part.kind, "onnx17")
    mould = None if template is None else find_mould(checkpoint, plan, cache, template)
    if entry is None or mould is None or not mould.castable:
        return None
    binary = replace(cast_part(plan, part, mould), net=entry.net)
    return check_binary(opened, checkpoint, plan, cache, binary, bundle / entry.file)


def check_lowered(opened: OpenPart, lowered: Path, simulator: Simulator) -> RungFindings:
    """The compiler's lowered graph, its weights beside it, against the template with the stored weights."""
    forms = lowered_values(lowered.read_text(), opened.order)
    run = partial(lowered_run, partial(simulator.look, lowered, opened.inputs), forms)
    return check_form(opened, "interpreter", tolerance_of(TOLERANCES, opened.scheme), run, forms)


def check_binary(
    opened: OpenPart, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, binary: Binary, file: Path
) -> RungFindings:
    """The weights in a file of the bundle, read back, against what casting makes of the checkpoint's.

    Args:
        plan: at the shapes of the bundle. binary: the cast part, for its map, its net called as in `file`.
    """
    from fluxkiln.quantize.side_tensors import split_slot

    shares: dict[str, dict[int, float]] = {}
    for stored, wrong_bytes in compare_part(checkpoint, plan, cache, binary, file).items():
        # what stands beside a weight's codes is the business of the same product
        slot = split_slot(stored)[0]
        shares[slot] = {-1: max([float(wrong_bytes.max()), *shares.get(slot, {}).values()])}

    def tell(wrong: Shares) -> str:
        share = max(share for ranks in wrong.values() for share in ranks.values())
        return (
            f"{', '.join(wrong)} in {file.name}: a share of {share:.2g} of the bytes is not what this checkpoint and "
            "scheme make"
        )

    return judge_stored("dequantized", opened.operations, shares, tell)


def lowered_values(text: str, values: Collection[str]) -> dict[str, Operation]:
    """Which of a template's values a lowered graph (`*_tpu.mlir`) has, under which name.

    The compiler calls a result after the value and the last operation that it fused into it: `/Add_3_output_0_Add`.
    """
    places = dict(_LOCATION.findall(text))
    known, found = set(values), {}
    for line in _LINE.finditer(text):
        name = places.get(line["loc"], "")
        value = name.rpartition("_")[0]
        if value in known:
            epsilon = _EPSILON.search(line["attributes"] or "")
            found[value] = Operation(name, line["name"], epsilon=float(epsilon[1]) if epsilon else None)
    return found


def lowered_run(
    look: Callable[[tuple[str, ...]], Values], found: Mapping[str, Operation], below: Values
) -> dict[str, NDArray[Any]]:
    """Values of a lowered graph by the template's names, in the shapes of `below`; those of another size are left out.

    Args:
        look: names of the lowered graph -> values.
    """
    names = {value: form.output for value, form in found.items() if value in below}
    seen = look(tuple(names.values()))
    return {
        value: seen[name].reshape(below[value].shape)
        for value, name in names.items()
        if seen[name].size == below[value].size
    }
