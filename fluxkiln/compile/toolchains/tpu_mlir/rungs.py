"""The rungs of a build: its lowered graphs in the compiler's interpreter, its files on the simulator, its bytes.

A chip's binary shows its outputs only. `look` compares a part's values in its lowered graph, and reads the weights in
the binary back byte by byte, where the bundle is there.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fluxkiln.artifacts.actions import ActionCache
from fluxkiln.compile.executor import bind_net
from fluxkiln.compile.onnx.runner import TemplateRunner
from fluxkiln.compile.opener import open_bundle
from fluxkiln.compile.plan import Binary, Made, Plan
from fluxkiln.compile.rungs import (
    STAGE,
    OpenPart,
    check_form,
    dequantized_rung,
    look_below,
    open_part,
    rungs_below,
    tell_rung,
)
from fluxkiln.compile.templates import find_template, make_template
from fluxkiln.compile.tensors import multiplications
from fluxkiln.compile.toolchain import OpenRungs, Rungs
from fluxkiln.compile.toolchains.tpu_mlir import environment
from fluxkiln.compile.toolchains.tpu_mlir.cast import cast_source, cast_weight_file, compare_stored, read_map
from fluxkiln.compile.toolchains.tpu_mlir.compiler import weight_file
from fluxkiln.compile.toolchains.tpu_mlir.executors import MOST_MULTIPLICATIONS, CmodelExecutor, Simulator
from fluxkiln.compile.toolchains.tpu_mlir.graphs import lean_graph
from fluxkiln.compile.toolchains.tpu_mlir.integers import set_multipliers
from fluxkiln.compile.toolchains.tpu_mlir.moulds import cast_part, compile_part, find_mould, make_mould
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.progress import Progress
from fluxkiln.quantize.side_tensors import split_slot
from fluxkiln.types import Part
from fluxkiln.verify.findings import Advice, Operation, PartFindings, Record, RungFindings, Tolerance, Values
from fluxkiln.verify.judgement import BF16, F16, F32, Shares, judge_stored, tolerance_of
from fluxkiln.verify.ladder import Ladder, gate_scheme

if TYPE_CHECKING:
    from numpy.typing import NDArray

# In W8A8 an input that bfloat16 puts on the other side of a step moves its products: 1.1 % and a channel by 3.2 % were
# measured, a shift that is off by one is 50 %.
_TOLERANCES = {"F32": F32, "F16": F16, "W8A8": Tolerance(3e-2, 0.1, 0.1), "*": BF16}
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


@contextmanager
def open_rungs(checkpoint: Checkpoint, plan: Plan, cache: ActionCache, made: Made, folder: Path) -> Iterator[OpenRungs]:
    """Every rung of a build, the simulator's where a step is not too much for it; without TPU-MLIR, what needs none."""
    with ExitStack() as stack:
        rungs = rungs_below(checkpoint, plan, cache)
        rungs |= stack.enter_context(execute(checkpoint, plan, cache, made, folder))
        env = environment.installed()
        if env is not None and multiplications(checkpoint, plan.shapes) <= MOST_MULTIPLICATIONS:
            homes = {part: folder / "bmodels" / file.name for file in made.files for part in file.parts}
            shutil.rmtree(folder / "bmodels", ignore_errors=True)
            (folder / "bmodels").mkdir(parents=True)
            for file in made.files:
                cache.store.export(file.blob.digest, folder / "bmodels" / file.name, link=True)
            nets = {binary.part.name: bind_net(binary, homes[binary.part.name]) for binary in made.binaries}
            simulator = CmodelExecutor(nets, env, plan.target.chip, log=plan.logs / "simulator.log")
            stack.callback(simulator.close)
            # a function, which is not closed after each part
            rungs["simulator"] = simulator.__call__
        yield OpenRungs(rungs, plan.parts)


@contextmanager
def execute(checkpoint: Checkpoint, plan: Plan, cache: ActionCache, made: Made, folder: Path) -> Iterator[Rungs]:
    """The interpreter's rung; none without TPU-MLIR."""
    env = environment.installed()
    if env is None:
        yield {}
        return
    binaries = {binary.part.name: binary for binary in made.binaries}
    with Simulator(env, plan.target.chip, plan.logs / "interpreter.log") as interpreter:
        yield {"interpreter": _Interpreted(checkpoint, plan, cache, binaries, interpreter, folder / "lowered")}


def read_back(ladder: Ladder, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, made: Made) -> None:
    """One row per cast part: its weights read back from the bundle's own file, against the checkpoint's.

    What a part computes dilutes one wrong scale among thousands of sound ones; its bytes do not.
    """
    homes = {part: cache.path(file.blob) for file in made.files for part in file.parts}
    for binary in made.binaries:
        if "map" not in binary.blobs:
            continue
        part = binary.part
        differing = compare_part(checkpoint, plan, cache, binary, homes[part.name])
        worst = max(differing, key=lambda slot: float(differing[slot].max()))
        output = f"weights of {worst}" if differing[worst].any() else "weights"
        equal = np.concatenate([1 - shares for shares in differing.values()])
        scheme, rungs = gate_scheme(binary.scheme), [("stored", equal)]
        ladder.compare(part.name, part.traits, output, -1, np.ones_like(equal), None, rungs, scheme)


def compare_part(
    checkpoint: Checkpoint, plan: Plan, cache: ActionCache, binary: Binary, file: Path
) -> dict[str, NDArray[Any]]:
    """What `compare_stored` says of a cast part, whose net is in `file`."""
    source = cast_source(checkpoint, plan, cache, binary.part)
    return compare_stored(file, binary.net, read_map(cache, binary.blobs["map"]), *source)


@dataclass(slots=True)
class _Interpreted:
    """Runs parts in the compiler's interpreter. The last one's lowered graph and its weights lie in `folder`."""

    checkpoint: Checkpoint
    plan: Plan
    cache: ActionCache
    binaries: Mapping[str, Binary]
    interpreter: Simulator
    folder: Path
    laid_out: str = ""

    def __call__(self, part: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The part's outputs by name, float32; errors as `Simulator.run`."""
        binary = self.binaries[part]
        if part != self.laid_out:
            self.close()
            lay_out_lowered(self.checkpoint, self.plan, self.cache, binary, self.folder)
            self.laid_out = part
        return self.interpreter.run(self.folder / "lowered.mlir", inputs, binary.part.traits.outputs)

    def close(self) -> None:
        """Remove the files; the runner can be used again."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.laid_out = ""


def lay_out_lowered(
    checkpoint: Checkpoint, plan: Plan, cache: ActionCache, binary: Binary, folder: Path, lean: bool = True
) -> None:
    """Write a part's lowered graph as `lowered.mlir` beside the weight file that it names; a cast part's is cast.

    Args:
        lean: in little memory (`lean_graph`); else as the compiler wrote it: in groups of heads the scores have names
            of their own.
    """
    folder.mkdir(parents=True)
    text = cache.path(binary.blobs["lowered"]).read_text()
    target = folder / weight_file(text)
    if "map" not in binary.blobs:
        shutil.copyfile(cache.path(binary.blobs["weights"]), target)
    else:
        reader, rounder_of = cast_source(checkpoint, plan, cache, binary.part)
        cast_weight_file(read_map(cache, binary.blobs["map"]), reader, target, rounder_of)
    if binary.scheme.integer:
        with np.load(target) as weights:
            text = set_multipliers(text, weights)
    (folder / "lowered.mlir").write_text(lean_graph(text) if lean else text)


def look(
    checkpoint: Checkpoint, plan: Plan, cache: ActionCache, part: Part, record: Record, progress: Progress
) -> PartFindings:
    """See `Toolchain.look`."""
    call, env, plan = record(), environment.installed(), plan.of(part)
    small = replace(plan, shapes=call.shapes)
    progress.stage(STAGE, 3)
    opened = open_stored(checkpoint, small, cache, part, call.inputs)
    rungs = look_below(opened, checkpoint, progress)
    if env is not None:
        with (
            tempfile.TemporaryDirectory(prefix="fluxkiln-look-") as scratch,
            Simulator(env, plan.target.chip, plan.logs / "debug.log") as simulator,
        ):
            binary = _make_binary(checkpoint, small, cache, part)
            lowered = Path(scratch) / "lowered" / "lowered.mlir"
            lay_out_lowered(checkpoint, small, cache, binary, lowered.parent, lean=False)
            rungs.append(check_lowered(opened, lowered, simulator))
    if stored := _read_back(opened, checkpoint, plan, cache, call.bundle):
        rungs.append(stored)
    tell_rung(rungs[-1], progress)
    missing = "not looked into: its interpreter is TPU-MLIR's, which is not installed here"
    return PartFindings(tuple(rungs), {} if env is not None else {"lowered graph": missing})


def open_stored(checkpoint: Checkpoint, plan: Plan, cache: ActionCache, part: Part, inputs: Values) -> OpenPart:
    """The part with every weight as the compiled form holds it."""
    rung = dequantized_rung(checkpoint, plan, cache)
    assert isinstance(rung, TemplateRunner)
    template = make_template(checkpoint, plan, cache, part.kind, "onnx17")
    opened = open_part(checkpoint, plan, part, template, inputs, rung.fill(part.name))
    return replace(opened, advice=_ADVICE)


def _make_binary(checkpoint: Checkpoint, plan: Plan, cache: ActionCache, part: Part) -> Binary:
    template = make_template(checkpoint, plan, cache, part.kind, "onnx17")
    mould = make_mould(checkpoint, plan, cache, template)
    return cast_part(plan, part, mould) if mould.castable else compile_part(checkpoint, plan, cache, part, template)


def _read_back(
    opened: OpenPart, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, bundle: Path
) -> RungFindings | None:
    """The part's weights in the build's own bundle; None where there is no bundle, or nothing was cast."""
    if not (bundle / "manifest.json").is_file():
        return None
    part = opened.part
    entry = next((one for one in open_bundle(bundle).manifest.parts if one.name == part.name), None)
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
    return check_form(opened, "interpreter", tolerance_of(_TOLERANCES, opened.scheme), run, forms)


def check_binary(
    opened: OpenPart, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, binary: Binary, file: Path
) -> RungFindings:
    """The weights in a file of the bundle, read back, against what casting makes of the checkpoint's.

    Args:
        plan: at the shapes of the bundle. binary: the cast part, for its map, its net called as in `file`.
    """
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
    """Values that `look` gives by the graph's own names by the template's, in the shapes of `below` or left out."""
    names = {value: form.output for value, form in found.items() if value in below}
    seen = look(tuple(names.values()))
    sized = {value: seen[name] for value, name in names.items() if seen[name].size == below[value].size}
    return {value: array.reshape(below[value].shape) for value, array in sized.items()}
