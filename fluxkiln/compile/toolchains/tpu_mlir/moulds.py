"""The stages that need the compiler: moulds, and parts compiled with their own weights.

A mould is a kind compiled once with random probe weights: its bmodel without them (the shell), the map that says which
bytes of its weights come from which slot, and the lowered graph for the interpreter. No checkpoint is in its key, and
no method of rounding, unless it needs more than codes: then the kind is compiled with that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxkiln.artifacts.actions import Action, ActionCache, ActionResult, run_action
from fluxkiln.artifacts.code import code_version
from fluxkiln.compile.plan import Binary, Plan
from fluxkiln.compile.templates import mould_net, net_name, weights_digest
from fluxkiln.compile.toolchains.tpu_mlir import environment
from fluxkiln.compile.toolchains.tpu_mlir.environment import TPU_MLIR_VERSION, TpuMlirEnv
from fluxkiln.compile.weights import part_weights, rounding_key
from fluxkiln.digests import digest_json
from fluxkiln.errors import CompileError, ToolchainError
from fluxkiln.export.bindings import bind_part
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.types import Part, Template


@dataclass(frozen=True, slots=True)
class Mould:
    """A compiled kind. `why` is empty, or why its bytes could not be traced back to weights and nothing can be cast."""

    kind: str
    result: ActionResult
    why: str

    @property
    def castable(self) -> bool:
        return not self.why


def make_mould(checkpoint: Checkpoint, plan: Plan, cache: ActionCache, template: Template) -> Mould:
    """A kind compiled with probe weights, and the map of its bytes; or the reason why it has none."""
    from fluxkiln.compile.toolchains.tpu_mlir.coefficients import Probe, learn_map, probe_reader
    from fluxkiln.compile.toolchains.tpu_mlir.shell import make_shell

    scheme = plan.schemes[template.kind]
    net = mould_net(plan, template.kind)

    def produce(folder: Path) -> tuple[dict[str, Path], dict[str, Any]]:
        import numpy as np

        form = compiled_form(plan, template, folder)

        def compile_probe(seed: int) -> Any:
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
            bits, group = scheme.weight_bits, scheme.group_size
            try:
                found = learn_map(compiled.bmodel, arrays, names, reader, group, bits, again)
            except CompileError as error:
                if not scheme.codes_only:
                    raise  # compiled one by one, its parts would be rounded as the compiler does
                return {}, {**compiled.facts, "why": str(error)}
        outputs = {"shell": folder / "shell.bmodel", "lowered": compiled.lowered, "map": folder / "map.json"}
        make_shell(compiled.bmodel, net, outputs["shell"])
        outputs["map"].write_text(json.dumps(found.to_json()))
        return outputs, {**compiled.facts, "why": ""}

    result = run_action(cache, mould_action(checkpoint, plan, template), produce)
    return Mould(template.kind, result, str(result.facts["why"]))


def compiled_form(plan: Plan, template: Template, folder: Path) -> Template:
    """What is compiled of a kind: its template, or where the method needs more than codes, a graph with that."""
    scheme = plan.schemes[template.kind]
    if scheme.codes_only:
        return template
    from fluxkiln.compile.toolchains.tpu_mlir.side_tensors import add_side_tensors

    return add_side_tensors(template, scheme, folder / "sided.onnx")


def mould_action(checkpoint: Checkpoint, plan: Plan, template: Template) -> Action:
    """The key of a mould: no checkpoint is in it."""
    net = mould_net(plan, template.kind)
    version = code_version(make_mould, model=type(checkpoint.model))
    return _compile_action(checkpoint, plan, "mould", version, template, net, {"template": template.digest})


def find_mould(checkpoint: Checkpoint, plan: Plan, cache: ActionCache, template: Template) -> Mould | None:
    """The mould of a kind if it is in the store."""
    result = cache.lookup(mould_action(checkpoint, plan, template).key)
    return None if result is None else Mould(template.kind, result, str(result.facts["why"]))


def cast_part(plan: Plan, part: Part, mould: Mould) -> Binary:
    """A part that is to be cast: its mould says what its binary is made of; no byte of it is written yet."""
    blobs = mould.result.outputs
    return Binary(
        part, net_name(part), plan.scheme(part), mould.result.facts, "cast",
        {name: blobs[name] for name in ("shell", "lowered", "map")},
    )  # fmt: skip


def compile_part(checkpoint: Checkpoint, plan: Plan, cache: ActionCache, part: Part, template: Template) -> Binary:
    """A part compiled with its own weights."""
    from fluxkiln.compile.toolchains.tpu_mlir.shell import make_shell

    def produce(folder: Path) -> tuple[dict[str, Path], dict[str, Any]]:
        form, reader = (
            compiled_form(plan, template, folder),
            part_weights(checkpoint, plan, cache, part, template),
        )
        compiled = compile_weights(checkpoint, plan, form, net_name(part), reader, folder, part.name)
        shell = folder / "shell.bmodel"
        make_shell(compiled.bmodel, net_name(part), shell)
        outputs = {"bmodel": compiled.bmodel, "lowered": compiled.lowered, "weights": compiled.weights}
        return {**outputs, "shell": shell}, dict(compiled.facts)

    result = run_action(cache, compile_action(checkpoint, plan, cache, part, template), produce)
    return Binary(
        part, net_name(part), plan.scheme(part), result.facts, "compiled", result.outputs, hit=result.hit
    )  # fmt: skip


def compile_action(checkpoint: Checkpoint, plan: Plan, cache: ActionCache, part: Part, template: Template) -> Action:
    """The key of a part compiled with its own weights."""
    binding = bind_part(part, template.slots, checkpoint)
    inputs = {"template": template.digest, "weights": weights_digest(checkpoint, binding)}
    if not plan.scheme(part).codes_only:  # what is packed follows from the method
        settings, calibration = rounding_key(checkpoint, plan, cache, part)
        inputs |= {"method": digest_json(settings), **calibration}
    version = code_version(compile_part, model=type(checkpoint.model))
    return _compile_action(checkpoint, plan, "compile", version, template, net_name(part), inputs)


def compile_memory(elements: int) -> int:
    """Peak bytes of compiling a graph with so many weights: the compiler, and 1.4 times the weights in float32.

    Measured on a double block of FLUX.1's width: 2.5 GB with 1.36 GB of weights.
    """
    return (700 << 20) + int(1.4 * 4 * elements)


def require_compiler(what: str) -> TpuMlirEnv:
    """TPU-MLIR's environment; ToolchainError when it is not there and the store lacks `what`."""
    env = environment.installed()
    if env is None:
        raise ToolchainError(
            f"{what} is not in the store, and TPU-MLIR, which makes it, is not installed in "
            f"{environment.default_tpu_mlir_root()}; run make env-tpu-mlir, name a finished environment with "
            "FLUXKILN_TPU_MLIR, or bring moulds from a machine that has it (fluxkiln mould export there, fluxkiln "
            "mould import here)"
        )
    return env


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
    read_weight: Any,
    folder: Path,
    log_name: str,
) -> Any:
    """Compile a template with the weights that `read_weight` gives, in `folder`; returns `tpu_mlir.Compiled`."""
    from fluxkiln.compile.onnx.filled import fill
    from fluxkiln.compile.toolchains.tpu_mlir.compiler import CompileJob, compile_graph
    from fluxkiln.compile.toolchains.tpu_mlir.gelu import fuse_tanh_gelu
    from fluxkiln.compile.toolchains.tpu_mlir.order import small_work_first

    env = require_compiler(f"{net} {plan.schemes[template.kind].name}")
    activations = {spec.name for spec in template.inputs}
    graph = folder / f"{net}.onnx"
    fill(template.path, activations, read_weight, graph, (fuse_tanh_gelu, small_work_first))
    work = folder / "work"
    work.mkdir()
    kind = checkpoint.model.kinds[template.kind]
    narrow_inputs, narrow_outputs = plan.target.narrows(kind)
    job = CompileJob(
        net=net,
        graph=graph,
        template=template.path,
        activations=frozenset(activations),
        scheme=plan.schemes[template.kind],
        chip=plan.target.chip,
        narrow_inputs=narrow_inputs,
        narrow_outputs=narrow_outputs,
        rotated=kind.rotated,
        ordered=kind.ordered,
    )
    return compile_graph(env, job, work, plan.logs / f"{log_name}.log")
