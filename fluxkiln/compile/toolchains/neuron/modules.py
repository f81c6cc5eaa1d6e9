"""From the parts of a split model to canonical HLO modules: one for every kind, whatever the number of its parts."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from fluxkiln.artifacts.actions import Action, ActionCache, run_action
from fluxkiln.artifacts.code import code_version
from fluxkiln.artifacts.store import Blob
from fluxkiln.compile.plan import Job, Plan
from fluxkiln.compile.templates import EXPORT_TOOLS, specs_from_json, specs_to_json
from fluxkiln.compile.toolchain import TRACE_MEMORY
from fluxkiln.compile.toolchains.neuron.frontend import VERSIONS
from fluxkiln.compile.toolchains.neuron.neff import ModuleForm, ModuleJob, hlo_file
from fluxkiln.digests import digest_json
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.progress import FROM_STORE, Progress
from fluxkiln.types import Part, TensorSpec

Dtype = Literal["bfloat16", "float32"]


@dataclass(frozen=True, slots=True)
class Module:
    """The module of some parts, as one rank runs it: a canonical HLO module proto.

    Attributes:
        name: what its files are called; kind: of `Part`.
        inputs: the activations it takes; slots: its weights after them, in the order of its parameters.
        outputs: by the names of the kind; its result is a tuple of them.
        facts: where it was lowered, counts and bytes of collectives, flops, bytes of parameters (`check.HloFacts`).
        hit: it was in the store.
    """

    name: str
    kind: str
    ranks: int
    hlo: Path
    digest: str
    inputs: tuple[TensorSpec, ...]
    slots: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    hit: bool = False

    @property
    def form(self) -> ModuleForm:
        """How the compiler is to take it, by its inputs."""
        if any("int" in spec.dtype for spec in self.inputs):
            return "text"
        return "image" if any(len(spec.shape) == 4 for spec in self.inputs) else "blocks"

    @property
    def blob(self) -> Blob:
        """The proto in the store."""
        return Blob(self.digest, self.hlo.stat().st_size)

    @property
    def parameters(self) -> tuple[TensorSpec, ...]:
        return self.inputs + self.slots


def lowering_versions() -> dict[str, str]:
    """What lowers, and its versions."""
    return {name: _version(name) for name in (*EXPORT_TOOLS[:3], *sorted(VERSIONS))}


def tools(plan: Plan) -> dict[str, str]:
    """What lowers and compiles, and its versions."""
    compiler = plan.layout.compiler
    return {**lowering_versions(), **({"neuronx_cc": compiler.version} if compiler else {})}


def lower_jobs(checkpoint: Checkpoint, plan: Plan, cache: ActionCache) -> list[Job]:
    """Of every module, that it is lowered."""
    actions = {module_name(part): lower_action(checkpoint, plan, part) for part in plan.parts}
    return [
        Job("lower", name, "", "BF16", TRACE_MEMORY, cache.lookup(action.key) is not None)
        for name, action in actions.items()
    ]


def module_name(part: Part) -> str:
    """The module that runs a part: `double`, or `double.4x` for one of four blocks."""
    name = module_kind(part)
    return name if not is_group(part) else f"{name}.{len(part.members)}x"


def module_kind(part: Part) -> str:
    """What modules call the kind of a part."""
    return part.traits.cut or part.kind


def is_group(part: Part) -> bool:
    """Whether it holds several blocks of one kind; what holds the whole transformer does not."""
    return len({kind for kind, _ in part.members}) == 1 < len(part.members)


def lower_modules(
    checkpoint: Checkpoint,
    plan: Plan,
    cache: ActionCache,
    progress: Progress,
    dtype: Dtype = "bfloat16",
    degree: int | None = None,
    stage: str = "lower",
) -> dict[str, Module]:
    """Module name -> the module of every kind of the model, from the store or lowered now.

    Args:
        degree: ranks of the parts that are cut, the split's by default; 1 for the same model on one core.

    Raises:
        ToolchainError: jax, jaxlib or torchax is missing or of another version. CompileError: a module breaks a rule.
    """
    parts = {module_name(part): part for part in plan.parts}
    progress.stage(stage, len(parts))
    made = {}
    for name, part in parts.items():
        started = time.perf_counter()
        made[name] = _lower(checkpoint, plan, cache, part, dtype, part.ranks(degree or plan.layout.degree))
        spent = f"lowered in {time.perf_counter() - started:.1f} s"
        progress.done(stage, name, FROM_STORE if made[name].hit else spent)
    return made


def lay_out_jobs(cache: ActionCache, modules: Mapping[str, Module], folder: Path) -> tuple[ModuleJob, ...]:
    """The modules as files of `folder/hlo`, and the compiler's jobs for them."""
    jobs = []
    for name, module in modules.items():
        target = folder / hlo_file(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        cache.store.export(module.digest, target)
        jobs.append(ModuleJob(name, module.form, target, module.digest))
    return tuple(jobs)


def _lower(checkpoint: Checkpoint, plan: Plan, cache: ActionCache, part: Part, dtype: Dtype, ranks: int) -> Module:
    def produce(folder: Path) -> tuple[dict[str, Path], dict[str, Any]]:
        from fluxkiln.compile.toolchains.neuron.check import check_hlo
        from fluxkiln.compile.toolchains.neuron.frontend import lower_module
        from fluxkiln.compile.toolchains.neuron.hlo_module import canonicalise

        source = (
            _split_part(checkpoint, plan, part, dtype, ranks)
            if part.traits.cut
            else _whole_part(checkpoint, plan, part, dtype)
        )
        lowered = lower_module(source.make, source.inputs, ranks, dtype)
        proto = canonicalise(lowered.proto)
        cut = ranks > 1
        facts = check_hlo(
            proto, all_reduces=source.all_reduces * cut, all_gathers=source.all_gathers * cut, ranks=ranks
        )
        path = folder / "module.pb"
        path.write_bytes(proto)
        count = len(source.inputs)
        slots = [replace(spec, name=source.slot_of(spec.name)) for spec in lowered.parameters[count:]]
        outputs = [replace(spec, name=name) for spec, name in zip(lowered.outputs, source.outputs, strict=True)]
        return {"hlo": path}, {
            "inputs": specs_to_json(lowered.parameters[:count]),
            "slots": specs_to_json(slots),
            "outputs": specs_to_json(outputs),
            "operations": dict(facts.operations),
            "all_reduce_bytes": list(facts.all_reduce_bytes),
            "all_gather_bytes": list(facts.all_gather_bytes),
            "parameter_bytes": facts.parameter_bytes,
            "flops": facts.flops,
        }

    action = lower_action(checkpoint, plan, part, dtype, ranks)
    result = run_action(cache, action, produce)
    blob, facts = result.outputs["hlo"], result.facts
    inputs, slots, outputs = (specs_from_json(facts[side]) for side in ("inputs", "slots", "outputs"))
    return Module(
        module_name(part), module_kind(part), ranks, cache.path(blob), blob.digest, inputs, slots, outputs, facts,
        result.hit,
    )  # fmt: skip


def lower_action(
    checkpoint: Checkpoint,
    plan: Plan,
    part: Part,
    dtype: Dtype = "bfloat16",
    ranks: int | None = None,
) -> Action:
    """The key of a part's module; no checkpoint is in it."""
    ranks = ranks or part.ranks(plan.layout.degree)
    return Action(
        stage="lower",
        what=f"{module_name(part)} {dtype} tp{ranks}",
        code_version=code_version(_lower, model=type(checkpoint.model)),
        inputs={"config": digest_json(_config(checkpoint, part))},
        settings={
            "kind": module_kind(part),
            "blocks": len(part.members),
            "shapes": [plan.shapes.height, plan.shapes.width, plan.shapes.tokens],
            "ranks": ranks,
            "dtype": dtype,
        },
        tools=lowering_versions(),
    )


@dataclass(frozen=True)
class _Source:
    """What is lowered: `make` gives the torch module of one rank for the collectives of the frontend."""

    make: Any
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    all_reduces: int
    all_gathers: int
    slot_of: Any = str


def _split_part(checkpoint: Checkpoint, plan: Plan, part: Part, dtype: Dtype, ranks: int) -> _Source:
    from fluxkiln.patches.collectives import ThreadRanks

    model = checkpoint.model

    def build(collectives: Any) -> Any:
        return model.build_parallel_part(part, checkpoint.configs, plan.shapes, collectives)

    known = build(ThreadRanks(ranks))
    return _Source(
        lambda collectives: build(collectives).module, known.inputs_in(dtype), known.outputs, known.all_reduces,
        known.all_gathers,
    )  # fmt: skip


def _whole_part(checkpoint: Checkpoint, plan: Plan, part: Part, dtype: Dtype) -> _Source:
    from fluxkiln.patches.parts import slot_name
    from fluxkiln.patches.patch import check_patches, patches_for

    model, configs = checkpoint.model, checkpoint.configs
    check_patches(patches_for(model.patches(), part.kind, "pt2"))
    narrow = {"int64": "int32", "float32": dtype}
    inputs = tuple(
        replace(spec, dtype=narrow[spec.dtype]) for spec in model.part_inputs(part.kind, configs, plan.shapes)
    )
    outputs = part.traits.outputs
    return _Source(lambda _: model.build_part(part.kind, configs), inputs, outputs, 0, 0, slot_name)


def _config(checkpoint: Checkpoint, part: Part) -> dict[str, Any]:
    """Without depths where they are of no influence: a block's or the tail's module is that of models of any depth."""
    config = {name: value for name, value in checkpoint.configs[part.folder].items() if not name.startswith("_")}
    alone = part.traits.ordered and part.traits.cut
    depths = checkpoint.model.whole_numbers.get(part.component, ()) if alone else ()
    return {name: value for name, value in config.items() if name not in depths}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
