"""From the parts of a split model to canonical HLO modules: one for every kind, whatever the number of its parts."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fluxkiln.artifacts.actions import Action, ActionCache, run_action
from fluxkiln.artifacts.code import code_version
from fluxkiln.artifacts.store import Blob
from fluxkiln.compile.doctor import installed_version
from fluxkiln.compile.plan import Job, Plan
from fluxkiln.compile.templates import EXPORT_TOOLS, specs_from_json, specs_to_json
from fluxkiln.compile.toolchain import TRACE_MEMORY
from fluxkiln.compile.toolchains.neuron.frontend import VERSIONS, RunDtype
from fluxkiln.compile.toolchains.neuron.neff import ModuleForm, ModuleJob, hlo_file
from fluxkiln.digests import digest_json
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.progress import FROM_STORE, Progress
from fluxkiln.types import SIZE_MARK, Part, TensorSpec


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
    return {name: installed_version(name) or "not installed" for name in (*EXPORT_TOOLS[:3], *sorted(VERSIONS))}


def tools(plan: Plan) -> dict[str, str]:
    """What lowers and compiles, and its versions."""
    compiler = plan.layout.compiler
    return {**lowering_versions(), **({"neuronx_cc": compiler.version} if compiler else {})}


def lower_jobs(checkpoint: Checkpoint, plan: Plan, cache: ActionCache) -> list[Job]:
    """Of every module, that it is lowered."""
    jobs = []
    for name, part in {module_name(part): part for part in plan.parts}.items():
        action = _lower_action(checkpoint, plan.of(part), part, "bfloat16", part.ranks(plan.layout.degree))
        jobs.append(Job("lower", name, "", "BF16", TRACE_MEMORY, cache.lookup(action.key) is not None))
    return jobs


def module_name(part: Part) -> str:
    """The module that runs a part: `double`, or `double.4x` for one of four blocks; that of all blocks is no group.

    At a further size it is `double.768x1344-512`.
    """
    group = len({kind for kind, _ in part.members}) == 1 < len(part.members)
    size = part.name.removeprefix(part.base).replace(SIZE_MARK, ".")
    return module_kind(part) + f".{len(part.members)}x" * group + size


def module_kind(part: Part) -> str:
    """What modules call the kind of a part."""
    return part.traits.cut or part.kind


def lower_modules(
    checkpoint: Checkpoint,
    plan: Plan,
    cache: ActionCache,
    progress: Progress,
    dtype: RunDtype = "bfloat16",
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
        made[name] = _lower(checkpoint, plan.of(part), cache, part, dtype, part.ranks(degree or plan.layout.degree))
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


def _lower(checkpoint: Checkpoint, plan: Plan, cache: ActionCache, part: Part, dtype: RunDtype, ranks: int) -> Module:
    def produce(folder: Path) -> tuple[dict[str, Path], dict[str, Any]]:
        from fluxkiln.compile.toolchains.neuron.check import check_hlo
        from fluxkiln.compile.toolchains.neuron.frontend import lower_module
        from fluxkiln.compile.toolchains.neuron.hlo_module import canonicalise

        source = (_split_part if part.traits.cut else _whole_part)(checkpoint, plan, part, dtype, ranks)
        lowered = lower_module(source.make, source.inputs, ranks, dtype)
        proto = canonicalise(lowered.proto)
        reduces, gathers = (source.all_reduces, source.all_gathers) if ranks > 1 else (0, 0)
        facts = check_hlo(proto, all_reduces=reduces, all_gathers=gathers, ranks=ranks)
        path = folder / "module.pb"
        path.write_bytes(proto)
        count = len(source.inputs)
        slots = [replace(spec, name=source.slot_of(spec.name)) for spec in lowered.parameters[count:]]
        outputs = [replace(spec, name=name) for spec, name in zip(lowered.outputs, source.outputs, strict=True)]
        return {"hlo": path}, {
            "inputs": specs_to_json(lowered.parameters[:count]),
            "slots": specs_to_json(slots),
            "outputs": specs_to_json(outputs),
            **asdict(facts),
        }

    result = run_action(cache, _lower_action(checkpoint, plan, part, dtype, ranks), produce)
    blob, facts = result.outputs["hlo"], result.facts
    inputs, slots, outputs = (specs_from_json(facts[side]) for side in ("inputs", "slots", "outputs"))
    return Module(
        module_name(part), module_kind(part), ranks, cache.path(blob), blob.digest, inputs, slots, outputs, facts,
        result.hit,
    )  # fmt: skip


def _lower_action(checkpoint: Checkpoint, plan: Plan, part: Part, dtype: RunDtype, ranks: int) -> Action:
    """The key of a part's module; no checkpoint is in it."""
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


def _split_part(checkpoint: Checkpoint, plan: Plan, part: Part, dtype: RunDtype, ranks: int) -> _Source:
    from fluxkiln.patches.cut import SilentRanks

    model = checkpoint.model

    def build(collectives: Any) -> Any:
        return model.build_parallel_part(part, checkpoint.configs, plan.shapes, collectives)

    one = build(SilentRanks(ranks))
    inputs = one.inputs_in(dtype)
    return _Source(lambda given: build(given).module, inputs, one.outputs, one.all_reduces, one.all_gathers)


def _whole_part(checkpoint: Checkpoint, plan: Plan, part: Part, dtype: RunDtype, ranks: int) -> _Source:
    from fluxkiln.patches.parts import slot_name
    from fluxkiln.patches.patch import check_patches, patches_for

    model, configs = checkpoint.model, checkpoint.configs
    check_patches(patches_for(model.patches(), part.kind, "pt2"))
    narrow, given = {"int64": "int32", "float32": dtype}, model.part_inputs(part.kind, configs, plan.shapes)
    inputs = tuple(replace(spec, dtype=narrow[spec.dtype]) for spec in given)
    return _Source(lambda _: model.build_part(part.kind, configs), inputs, part.traits.outputs, 0, 0, slot_name)


def _config(checkpoint: Checkpoint, part: Part) -> dict[str, Any]:
    """Without depths where they are of no influence: a block's or the tail's module is that of models of any depth."""
    config = {name: value for name, value in checkpoint.configs[part.folder].items() if not name.startswith("_")}
    alone = part.traits.ordered and part.traits.cut
    depths = checkpoint.model.whole_numbers.get(part.component, ()) if alone else ()
    return {name: value for name, value in config.items() if name not in depths}
