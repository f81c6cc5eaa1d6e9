"""GGUF as a toolchain: whole components packed into files that other programs load, and those files read back."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.artifacts.actions import Action, ActionCache, ActionResult, run_action
from fluxkiln.artifacts.code import code_version
from fluxkiln.compile.bundle import Bundle, refuse_part
from fluxkiln.compile.executor import Executor
from fluxkiln.compile.plan import Binary, BundleFile, Job, Made, Plan
from fluxkiln.compile.repacked import BYTES_AT_ONCE
from fluxkiln.compile.templates import count_elements, make_template
from fluxkiln.compile.tensors import part_bytes, part_refs, stored_forms
from fluxkiln.compile.toolchain import API, OpenRungs, Rungs, Toolchain, ToolStatus
from fluxkiln.compile.toolchains.gguf.file import FileReader, file_name, plan_file, write_file
from fluxkiln.digests import digest_json
from fluxkiln.errors import UsageError
from fluxkiln.export.bindings import bind_part, read_slots
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.progress import FROM_STORE, Laps, Progress, byte_counter, count_bytes
from fluxkiln.settings import Settings
from fluxkiln.types import find_part
from fluxkiln.verify.gates import STORED, Gate, Rung

if TYPE_CHECKING:
    from fluxkiln.verify.ladder import Ladder

RUNGS: tuple[Rung, ...] = (
    Rung("loaded", 4, "the bundle's own files, read by the format's own reader, float32 arithmetic",
         "the file: a tensor under another's name, rows joined in another order, or a block packed wrong", STORED,
         series=4),
    Rung("named", 5, "every row of the file's tensors, numbered, through diffusers' own converter",
         "the layout: a name, the order in which rows are joined, or halves that change places", series=1, exact=True),
)  # fmt: skip
# What a format leaves of a Gaussian weight, relative to it: Q8_0 0.005, Q6_K 0.018, Q5_* 0.036 to 0.043, Q4_* 0.072 to
# 0.086. What is turned grows with its square: W4BF16 has 0.09 and 0.01, so 0.002 for 0.04 and 0.0004 for 0.018.
_TURNS: tuple[tuple[str, float, float], ...] = (
    ("Q8_0*", 0.9999, 50.0), ("Q6_K*", 0.9995, 45.0), ("Q5_*", 0.9975, 38.0), ("Q4_*", 0.99, 33.0),
)  # fmt: skip

GATES: tuple[Gate, ...] = (
    Gate("named", "*", "*", "*", "max_abs", 0.0, "reference",
         "programs find a weight by its name and its rows alone: each has to be where it was taken from"),
    Gate("loaded", "*", "part", "*", "relative_l2", 2e-3, "previous",
         "the same codes in float32 on both sides; norm weights are float32 in the file and 16 bits on the rung below: "
         "7e-4 was measured"),
    *(
        gate
        for form, cosine, psnr in _TURNS
        for gate in (
            Gate("scheme", form, "residual", "*", "delta_cosine", cosine, "reference",
                 "what its codes leave of a weight turns what a block adds by the square of that"),
            Gate("scheme", form, "whole", "*", "cosine", cosine, "reference",
                 "without a residual stream the whole output is what the weights compute"),
            Gate("scheme", form, "pipeline", "latents", "cosine", cosine, "reference",
                 "no less than one part is granted: errors of blocks are not alike", True),
            Gate("scheme", form, "pipeline", "image", "psnr", psnr, "reference",
                 "W4BF16's 33 dB, and as much more as its codes leave less of a weight", True),
        )
    ),
)  # fmt: skip


class Gguf(Toolchain):
    """See `compile.toolchain.Toolchain`."""

    api = API
    name = "gguf"
    rungs = RUNGS
    gates = GATES

    def tools(self, plan: Plan) -> dict[str, str]:
        return {"gguf": importlib.metadata.version("gguf")}

    def check(self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache) -> None:
        for folder in _folders(plan):
            plan_file(checkpoint, plan, folder)

    def jobs(self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, settings: Settings) -> list[Job]:
        known = {
            folder: cache.lookup(file_action(checkpoint, plan, folder).key) is not None
            for folder in _folders(plan)
            if folder in checkpoint.digests
        }
        return [
            Job(
                "cast", part.name, part.kind, plan.scheme(part).name, 8 * BYTES_AT_ONCE, known.get(part.folder, False),
                count_elements(part_refs(checkpoint, plan, part)),
            )
            for part in plan.parts
        ]  # fmt: skip

    def make(
        self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, settings: Settings, progress: Progress, laps: Laps
    ) -> Made:
        binaries, files, paths = [], [], {}
        for folder in _folders(plan):
            parts = tuple(part for part in plan.parts if part.folder == folder)
            found = store_file(checkpoint, plan, cache, folder, progress)
            blob = found.outputs["file"]
            files.append(BundleFile(file_name(folder), blob, tuple(part.name for part in parts), found.hit))
            paths[folder] = cache.path(blob)
            for part in parts:
                specs = checkpoint.model.part_inputs(part.kind, checkpoint.configs, plan.shapes)
                size = part_bytes(checkpoint, plan, part)
                facts = {
                    "inputs": [[spec.name, spec.dtype, list(spec.shape)] for spec in specs],
                    "outputs": [],
                    "weight_bytes": size,
                    "instruction_bytes": 0,
                    "runtime_bytes": 0,
                }
                binaries.append(
                    Binary(part, part.name, plan.scheme(part), facts, "packed", {"file": blob}, blob.digest, size)
                )
        laps.lap("pack")
        return Made(tuple(binaries), tuple(files), own=paths)

    @contextmanager
    def open_rungs(
        self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, made: Made, folder: Path, progress: Progress
    ) -> Iterator[OpenRungs]:
        from fluxkiln.compile.rungs import rungs_below

        with self.execute(checkpoint, plan, cache, made, folder) as own:
            yield OpenRungs({**rungs_below(checkpoint, plan, cache), **own}, plan.parts)

    @contextmanager
    def execute(
        self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, made: Made, folder: Path
    ) -> Iterator[Rungs]:
        from fluxkiln.compile.onnx.runner import Filling, TemplateRunner

        readers = {name: FileReader(checkpoint, name, path) for name, path in made.own.items()}

        def fill(name: str) -> Filling:
            part = find_part(plan.parts, name)
            template = make_template(checkpoint, plan, cache, part.kind, plan.target.graph_format)
            binding = bind_part(part, template.slots, checkpoint)
            return Filling(template, read_slots(binding, readers[part.folder]))

        yield {"loaded": TemplateRunner(fill)}

    def read_back(self, ladder: Ladder, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, made: Made) -> None:
        from fluxkiln.compile.toolchains.gguf.names import compare_names

        compare_names(ladder, checkpoint, plan)

    def check_parts(self, bundle: Bundle, fresh: Collection[str]) -> None:
        """All parts of a component are in one file, and have its digest."""
        files = {file.path: file for file in bundle.manifest.files}
        for part, entry in zip(bundle.parts, bundle.manifest.parts, strict=True):
            if (entry.file, entry.net, entry.digest) != (file_name(part.folder), part.name, files[entry.file].digest):
                raise refuse_part(bundle, part.name, f"is said to be {entry.net} in {entry.file} of {entry.digest}")

    def open_executor(self, bundle: Bundle, name: str | None, options: Mapping[str, Any]) -> Executor:
        raise UsageError(
            f"{bundle.folder} has GGUF files, which other programs run: give them to stable-diffusion.cpp, ComfyUI or "
            "diffusers, as docs/targets.md shows; for an image here use a bundle for cpu"
        )

    def doctor(self) -> Sequence[ToolStatus]:
        return (ToolStatus("gguf", True, importlib.metadata.version("gguf"), "", ""),)


def file_action(checkpoint: Checkpoint, plan: Plan, folder: str) -> Action:
    """The key of a file: the tensors that it holds, and how each is stored."""
    return Action(
        stage="pack",
        what=file_name(folder),
        code_version=code_version(write_file, model=type(checkpoint.model)),
        inputs={"weights": digest_json(dict(checkpoint.digests[folder]))},
        settings={"folder": folder, "forms": digest_json(stored_forms(checkpoint, plan, folder))},
        tools={"gguf": importlib.metadata.version("gguf")},
    )


def store_file(checkpoint: Checkpoint, plan: Plan, cache: ActionCache, folder: str, progress: Progress) -> ActionResult:
    """A file from the store, or packed now."""
    action, name = file_action(checkpoint, plan, folder), file_name(folder)
    total = sum(ref.nbytes for ref in checkpoint.tensors[folder].values())

    def produce(work: Path) -> tuple[dict[str, Path], dict[str, Any]]:
        count = byte_counter(total, count_bytes(progress, f"pack {name}", "packed"))
        write_file(checkpoint, plan, folder, work / name, count)
        return {"file": work / name}, {}

    result = run_action(cache, action, produce)
    if result.hit:
        progress.stage(f"pack {name}", 1)
        progress.done(f"pack {name}", name, FROM_STORE)
    return result


def _folders(plan: Plan) -> list[str]:
    """The folders of the checkpoint whose weights the parts have, in the order they run."""
    return list(dict.fromkeys(part.folder for part in plan.parts))


TOOLCHAIN = Gguf()
