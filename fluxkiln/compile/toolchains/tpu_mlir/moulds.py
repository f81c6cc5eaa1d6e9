"""The stages that need the compiler: moulds, the proof of each, and parts compiled with their own weights.

A mould is a kind compiled once with random probe weights: its bmodel without them (the shell), the map that says which
bytes of its weights come from which slot, and the lowered graph for the interpreter. No checkpoint is in its key, and
no method of rounding, unless it needs more than codes: then the kind is compiled with that. Its proof is that what the
compiler makes of other weights and what is cast of them are identical.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fluxkiln.artifacts.actions import Action, ActionCache, ActionResult, run_action
from fluxkiln.artifacts.code import code_version
from fluxkiln.compile.onnx.filled import fill, weight_matmuls
from fluxkiln.compile.plan import Binary, Plan
from fluxkiln.compile.templates import base_net, mould_net, net_name, weights_digest
from fluxkiln.compile.toolchains.tpu_mlir.bmodel import hash_span, read_bmodel
from fluxkiln.compile.toolchains.tpu_mlir.cast import cast_region, cast_source, read_map
from fluxkiln.compile.toolchains.tpu_mlir.coefficients import CoefficientMap, Probe, learn_map, probe_reader
from fluxkiln.compile.toolchains.tpu_mlir.compiler import Compiled, CompileJob, compile_graph, require_compiler
from fluxkiln.compile.toolchains.tpu_mlir.environment import TPU_MLIR_VERSION
from fluxkiln.compile.toolchains.tpu_mlir.gelu import fuse_tanh_gelu
from fluxkiln.compile.toolchains.tpu_mlir.graphs import add_side_tensors, small_work_first
from fluxkiln.compile.toolchains.tpu_mlir.integers import same_but_for_shifts, with_shifts_of
from fluxkiln.compile.toolchains.tpu_mlir.shell import lay_out, make_shell
from fluxkiln.compile.weights import part_weights, rounding_key
from fluxkiln.digests import digest_json
from fluxkiln.errors import CompileError
from fluxkiln.export.bindings import bind_part
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.quantize.pack import RounderOf
from fluxkiln.quantize.rounders import as_compiler
from fluxkiln.quantize.schemes import Scheme
from fluxkiln.types import Part, Template, WeightReader


@dataclass(frozen=True, slots=True)
class Mould:
    """A compiled kind. `why` is empty, or why its bytes could not be traced back to weights and nothing can be cast."""

    kind: str
    result: ActionResult

    @property
    def why(self) -> str:
        return str(self.result.facts["why"])

    @property
    def castable(self) -> bool:
        return not self.why


def make_mould(checkpoint: Checkpoint, plan: Plan, cache: ActionCache, template: Template) -> Mould:
    """A kind compiled with probe weights, and the map of its bytes; or the reason why it has none."""
    scheme, net = plan.schemes[template.kind], mould_net(plan, template.kind)

    def produce(folder: Path) -> tuple[dict[str, Path], dict[str, Any]]:
        import numpy as np

        form = compiled_form(plan, template, folder)

        def compile_probe(seed: int) -> tuple[Compiled, WeightReader]:
            place = folder / f"probe-{seed}"
            place.mkdir()
            reader = probe_reader(form.slots, seed)
            return compile_weights(checkpoint, plan, form, net, reader, place, f"mould.{template.kind}.{seed}"), reader

        def again() -> Probe:
            other, reader = compile_probe(1)
            return Probe(other.bmodel, loaded.enter_context(np.load(other.weights)), reader)

        compiled, reader = compile_probe(0)
        with ExitStack() as loaded:
            arrays = loaded.enter_context(np.load(compiled.weights))
            names = [spec.name for spec in form.slots]
            try:
                found = learn_map(
                    compiled.bmodel, arrays, names, reader, scheme.group_size, scheme.weight_bits, again,
                    coded_slots(form, scheme) if scheme.integer else (),
                )  # fmt: skip
            except CompileError as error:
                if not scheme.codes_only:
                    raise  # compiled one by one, its parts would be rounded as the compiler does
                return {}, {**compiled.facts, "why": str(error)}
        outputs = {"shell": folder / "shell.bmodel", "lowered": compiled.lowered, "map": folder / "map.json"}
        make_shell(compiled.bmodel, net, outputs["shell"])
        outputs["map"].write_text(json.dumps(found.to_json()))
        return outputs, {**compiled.facts, "why": ""}

    return Mould(template.kind, run_action(cache, mould_action(checkpoint, plan, template), produce))


def compiled_form(plan: Plan, template: Template, folder: Path) -> Template:
    """What is compiled of a kind: its template, or where the method needs more than codes, a graph with that."""
    scheme = plan.schemes[template.kind]
    return template if scheme.codes_only else add_side_tensors(template, scheme, folder / "sided.onnx")


def coded_slots(template: Template, scheme: Scheme) -> list[str]:
    """The slots of a template that a scheme stores in codes."""
    matmuls = weight_matmuls(template.path, {spec.name for spec in template.inputs})
    return list(dict.fromkeys(one.slot for one in matmuls if scheme.in_codes(one.slot)))


def mould_action(checkpoint: Checkpoint, plan: Plan, template: Template) -> Action:
    """The key of a mould: no checkpoint is in it."""
    net = mould_net(plan, template.kind)
    version = code_version(make_mould, model=type(checkpoint.model))
    return _compile_action(checkpoint, plan, "mould", version, template, net, {"template": template.digest})


def find_mould(checkpoint: Checkpoint, plan: Plan, cache: ActionCache, template: Template) -> Mould | None:
    """The mould of a kind if it is in the store."""
    result = cache.lookup(mould_action(checkpoint, plan, template).key)
    return None if result is None else Mould(template.kind, result)


def cast_part(plan: Plan, part: Part, mould: Mould) -> Binary:
    """A part that is to be cast: its mould says what its binary is made of; no byte of it is written yet."""
    blobs = {name: mould.result.outputs[name] for name in ("shell", "lowered", "map")}
    return Binary(part, net_name(part), plan.scheme(part), mould.result.facts, "cast", blobs)


def compile_part(checkpoint: Checkpoint, plan: Plan, cache: ActionCache, part: Part, template: Template) -> Binary:
    """A part compiled with its own weights."""
    net = base_net(part)

    def produce(folder: Path) -> tuple[dict[str, Path], dict[str, Any]]:
        form = compiled_form(plan, template, folder)
        reader = part_weights(checkpoint, plan, cache, part, template)
        compiled = compile_weights(checkpoint, plan, form, net, reader, folder, part.name)
        shell = folder / "shell.bmodel"
        make_shell(compiled.bmodel, net, shell)
        outputs = {"bmodel": compiled.bmodel, "lowered": compiled.lowered, "weights": compiled.weights}
        return {**outputs, "shell": shell}, dict(compiled.facts)

    result = run_action(cache, compile_action(checkpoint, plan, cache, part, template), produce)
    return Binary(part, net_name(part), plan.scheme(part), result.facts, "compiled", result.outputs, hit=result.hit)


def compile_action(checkpoint: Checkpoint, plan: Plan, cache: ActionCache, part: Part, template: Template) -> Action:
    """The key of a part compiled with its own weights."""
    binding = bind_part(part, template.slots, checkpoint)
    inputs = {"template": template.digest, "weights": weights_digest(checkpoint, binding)}
    if not plan.scheme(part).codes_only:  # what is packed follows from the method
        settings, calibration = rounding_key(checkpoint, plan, cache, part)
        inputs |= {"method": digest_json(settings), **calibration}
    version = code_version(compile_part, model=type(checkpoint.model))
    return _compile_action(checkpoint, plan, "compile", version, template, base_net(part), inputs)


def compile_memory(elements: int) -> int:
    """Peak bytes of compiling a graph with so many weights: the compiler, and 1.4 times the weights in float32.

    Measured on a double block of FLUX.1's width: 2.5 GB with 1.36 GB of weights.
    """
    return (700 << 20) + int(1.4 * 4 * elements)


def _compile_action(
    checkpoint: Checkpoint,
    plan: Plan,
    stage: str,
    version: str,
    template: Template,
    net: str,
    inputs: Mapping[str, str],
) -> Action:
    scheme = plan.schemes[template.kind]
    return Action(
        stage=stage,
        what=f"{net} {scheme.compiled_name}",
        code_version=version,
        inputs=inputs,
        settings={
            "net": net,
            "scheme": scheme.compiled_name,
            **({} if scheme.codes_only else {"beside": list(scheme.how.roles)}),
            "chip": plan.target.chip,
            "narrow": list(plan.target.narrows(checkpoint.model.kinds[template.kind])),
        },
        tools={"tpu_mlir": TPU_MLIR_VERSION},
    )


def compile_weights(
    checkpoint: Checkpoint,
    plan: Plan,
    template: Template,
    net: str,
    read_weight: WeightReader,
    folder: Path,
    log_name: str,
) -> Compiled:
    """Compile a template with the weights that `read_weight` gives, in `folder`."""
    env = require_compiler(f"{net} {plan.schemes[template.kind].name}")
    activations = {spec.name for spec in template.inputs}
    graph, work = folder / f"{net}.onnx", folder / "work"
    fill(template.path, activations, read_weight, graph, (fuse_tanh_gelu, small_work_first))
    work.mkdir()
    kind = checkpoint.model.kinds[template.kind]
    job = CompileJob(
        net, graph, template.path, frozenset(activations), plan.schemes[template.kind], plan.target.chip,
        *plan.target.narrows(kind), rotated=kind.rotated, ordered=kind.ordered, narrow_gelus=plan.target.narrow_gelus,
        float_groups=plan.target.float_groups,
    )  # fmt: skip
    return compile_graph(env, job, work, plan.logs / f"{log_name}.log")


def proof_part(parts: list[Part], seed: int) -> Part:
    """The part of a kind that is compiled as well as cast: any of them, but the same for the same seed."""
    key = hashlib.sha256(f"{seed}/{parts[0].kind}".encode()).digest()
    return parts[int.from_bytes(key[:4], "little") % len(parts)]


def proof_action(mould: Mould) -> Action:
    """The key of a mould's proof: its bytes, their map, and the code that compiles and casts probe weights.

    No checkpoint is in it and no other method of rounding: that a cast has its weights in the right places is proven.
    """
    inputs = {name: mould.result.outputs[name].digest for name in ("shell", "map")}
    return Action("proof", f"casts of {mould.kind}", code_version(prove_mould), inputs)


def needs_proof(cache: ActionCache, mould: Mould | None) -> bool:
    """Whether casts of this kind have yet to be proven: the mould is still to be made, or no proof was recorded."""
    if mould is None:
        return True
    return mould.castable and cache.lookup(proof_action(mould).key) is None


def prove_mould(checkpoint: Checkpoint, plan: Plan, cache: ActionCache, template: Template, mould: Mould) -> None:
    """Compile other probe weights and cast them into the mould; CompileError unless both come out identical."""
    net = mould_net(plan, mould.kind)
    with cache.store.workdir(f"proof of {mould.kind}") as folder:
        form = compiled_form(plan, template, folder)
        reader = probe_reader(form.slots, seed=1)
        compiled = compile_weights(checkpoint, plan, form, net, reader, folder, f"proof.{mould.kind}").bmodel
        make_shell(compiled, net, folder / "shell.bmodel")
        shells = cache.path(mould.result.outputs["shell"]), folder / "shell.bmodel"
        same, same_shell, _ = _compare(plan, cache, mould, mould.kind, compiled, shells, reader)
        _judge(mould.kind, same, same_shell)
    cache.record(proof_action(mould), {}, {"part": "", "weights": "probe weights of seed 1"})


def prove_cast(
    cast: Binary, direct: Binary, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, mould: Mould
) -> Binary:
    """The cast part, marked as proven; later builds find the proof recorded for `mould`.

    Its stored weights must have the digest of those in the direct compile, and all else of the two must be the same
    bytes but for the net's name. Where the scheme's method is not the compiler's, the part is cast once more as the
    compiler rounds, which must be identical, and once more by its own method, which must be what was shipped: so the
    shipped weights differ from the compiler's in their codes, scales and zero points, and in nothing else. By a method
    that needs more than codes both round what is left of the weights, and what stands beside the codes is the same.

    In integers (W8A8) a compile chooses the shift of each matmul by its weights. So the part is cast for the shifts of
    the direct compile as well, which must be identical, and the shifts are all that may differ besides.

    Raises:
        CompileError: the cast differs from what the compiler itself makes of the same weights.
    """
    compiled = cache.path(direct.blobs["bmodel"])
    reader, own = cast_source(checkpoint, plan, cache, cast.part)
    with cache.store.workdir(f"proof of {cast.part.name}") as folder:
        make_shell(cache.path(cast.blobs["shell"]), base_net(cast.part), folder / "shell.bmodel")
        shells = folder / "shell.bmodel", cache.path(direct.blobs["shell"])
        same, same_shell, moved = _compare(plan, cache, mould, cast.part.name, compiled, shells, reader)
        made = _cast_into(plan, cache, mould, read_map(cache, mould.result.outputs["map"]), folder, reader, own)
        _judge(cast.part.name, same and "sha256:" + made.hex() == cast.digest, same_shell)
    cache.record(proof_action(mould), {}, {"part": cast.part.name, "weights": cast.digest})
    return replace(cast, made=f"cast, compiled: identical{' by value, other shifts' * moved}")


def _compare(
    plan: Plan,
    cache: ActionCache,
    mould: Mould,
    what: str,
    compiled: Path,
    shells: tuple[Path, Path],
    read_weight: WeightReader,
) -> tuple[bool, bool, bool]:
    """Whether a compile has the weights that are cast as the compiler rounds, whether it has the mould's shell but for
    shifts, and whether the two have other shifts."""
    (direct,) = read_bmodel(compiled).nets
    found, shifts = read_map(cache, mould.result.outputs["map"]), [(0, 0)]
    if plan.schemes[mould.kind].integer:
        found, shifts = with_shifts_of(compiled, direct.coefficients.start, found, read_weight)
    with cache.store.workdir(f"cast of {what}") as folder:
        made = _cast_into(plan, cache, mould, found, folder, read_weight)
    same = made == hash_span(compiled, direct.coefficients)
    return same, same_but_for_shifts(*shells, shifts), any(ours != theirs for ours, theirs in shifts)


def _cast_into(
    plan: Plan,
    cache: ActionCache,
    mould: Mould,
    coefficients: CoefficientMap,
    folder: Path,
    read_weight: WeightReader,
    rounder_of: RounderOf = as_compiler,
) -> bytes:
    """The digest of weights that are cast into the mould's own shell, in `folder`."""
    target, sizes = folder / "cast.bmodel", {mould_net(plan, mould.kind): coefficients.size}
    (region,) = lay_out(cache.path(mould.result.outputs["shell"]), sizes, target).values()
    return cast_region(target, region, coefficients, read_weight, rounder_of)


def _judge(what: str, same_weights: bool, same_shell: bool) -> None:
    differing = [name for name, same in (("weights", same_weights), ("instructions", same_shell)) if not same]
    if differing:
        raise CompileError(
            f"{what}: its {' and '.join(differing)} differ from what the compiler makes of the same weights, and they "
            "must be equal; the mould's map is wrong: this is a bug of fluxkiln, and nothing was written"
        )
