"""What toolchains have in common whose bundles are whole components in files of other programs: nothing is compiled.

A folder of the checkpoint becomes one or more files at once. Verification reads them back and runs every part with what
is in them; a toolchain adds what only the other program can tell, names above all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.artifacts.actions import Action, ActionCache, ActionResult, run_action
from fluxkiln.artifacts.code import code_version
from fluxkiln.compile.bundle import Bundle, refuse_part
from fluxkiln.compile.plan import Binary, BundleFile, Job, Made, Plan
from fluxkiln.compile.repacked import BYTES_AT_ONCE
from fluxkiln.compile.templates import count_elements, make_template
from fluxkiln.compile.tensors import part_bytes, part_refs, stored_forms
from fluxkiln.compile.toolchain import OpenRungs, Rungs, Toolchain
from fluxkiln.digests import digest_json
from fluxkiln.export.bindings import bind_part, read_slots
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.progress import FROM_STORE, Laps, Progress, byte_counter, count_bytes
from fluxkiln.settings import Settings
from fluxkiln.types import find_part
from fluxkiln.verify.gates import STORED, Gate, Rung

if TYPE_CHECKING:
    from numpy.typing import NDArray

# what the bundle's files are read back at
LOADED = Rung("loaded", 4, "the bundle's own files, read by the format's own reader, float32 arithmetic",
              "the file: a tensor under another's name, rows joined in another order, or a block packed wrong", STORED,
              series=4)  # fmt: skip
# what another program's own table of names finds in them
NAMED = Rung("named", 5, "every row of the files' tensors, numbered, through the other program's own table of names",
             "the layout: a name, the order in which rows are joined, or halves that change places", series=1,
             exact=True)  # fmt: skip
NAMED_GATE = Gate("named", "*", "*", "*", "max_abs", 0.0, "reference",
                  "programs find a weight by its name and its rows alone: each has to be where it was taken "
                  "from")  # fmt: skip
LOADED_GATE = Gate("loaded", "*", "part", "*", "relative_l2", 2e-3, "previous",
                   "the same codes in float32 on both sides; norm weights are float32 in the file and 16 bits on the "
                   "rung below: 7e-4 was measured")  # fmt: skip

# checkpoint, plan, folder of the checkpoint, a folder for the files, told of bytes -> file, below that folder, and the
# tensors of the checkpoint that begin in it
WriteFiles = Callable[[Checkpoint, Plan, str, Path, Callable[[int], None]], dict[str, list[str]]]
# checkpoint, plan, folder of the checkpoint, its files -> a tensor of the checkpoint, float32, by its name
OpenFiles = Callable[[Checkpoint, Plan, str, Mapping[str, Path]], Callable[[str], "NDArray[Any]"]]


def weight_gates(forms: Sequence[tuple[str, float, float]]) -> tuple[Gate, ...]:
    """Gates of formats of files: a pattern of schemes, the least cosine of what a block adds, and PSNR of an image."""
    return tuple(
        gate
        for form, cosine, psnr in forms
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
    )  # fmt: skip


class Repacker(Toolchain):
    """See `compile.toolchain.Toolchain`.

    Attributes:
        write, read: functions of the top level of a module, so that what they reach is in the keys of files.
    """

    write: WriteFiles
    read: OpenFiles

    def jobs(self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, settings: Settings) -> list[Job]:
        known = {
            folder: cache.lookup(self.file_action(checkpoint, plan, folder).key) is not None
            for folder in part_folders(plan)
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
        binaries, files, paths = [], [], dict[str, dict[str, Path]]()
        for folder in part_folders(plan):
            found = self.store_files(checkpoint, plan, cache, folder, progress)
            begins: Any = found.facts["begins"]
            file_of = {tensor: file for file, tensors in begins.items() for tensor in tensors}
            held = dict[str, list[str]]()
            for part in (part for part in plan.parts if part.folder == folder):
                file = file_of[part_refs(checkpoint, plan, part)[0].name]
                held.setdefault(file, []).append(part.name)
                specs = checkpoint.model.part_inputs(part.kind, checkpoint.configs, plan.shapes)
                size, blob = part_bytes(checkpoint, plan, part), found.outputs[file]
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
            files += [BundleFile(name, blob, tuple(held.get(name, ())), found.hit)
                      for name, blob in found.outputs.items()]  # fmt: skip
            paths[folder] = {name: cache.path(blob) for name, blob in found.outputs.items()}
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

        readers = {name: self.read(checkpoint, plan, name, paths) for name, paths in made.own.items()}

        def fill(name: str) -> Filling:
            part = find_part(plan.parts, name)
            template = make_template(checkpoint, plan.of(part), cache, part.kind, plan.target.graph_format)
            binding = bind_part(part, template.slots, checkpoint)
            return Filling(template, read_slots(binding, readers[part.folder]))

        yield {LOADED.name: TemplateRunner(fill)}

    def check_parts(self, bundle: Bundle, fresh: Collection[str]) -> None:
        """A part has the digest of the file in which its component's first tensor of it lies."""
        files = {file.path: file for file in bundle.manifest.files}
        for part, entry in zip(bundle.parts, bundle.manifest.parts, strict=True):
            if (entry.net, entry.digest) != (part.name, files[entry.file].digest):
                raise refuse_part(bundle, part.name, f"is said to be {entry.net} in {entry.file} of {entry.digest}")

    def file_action(self, checkpoint: Checkpoint, plan: Plan, folder: str) -> Action:
        """The key of a folder's files: the tensors that they hold, and how each is stored."""
        return Action(
            stage="pack",
            what=f"{folder} for {plan.target.name}",
            code_version=code_version(self.write, model=type(checkpoint.model)),
            inputs={"weights": digest_json(dict(checkpoint.digests[folder]))},
            settings={
                "folder": folder,
                "layout": plan.target.chip,
                "forms": digest_json(stored_forms(checkpoint, plan, folder)),
            },
            tools=self.tools(plan),
        )

    def store_files(
        self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, folder: str, progress: Progress
    ) -> ActionResult:
        """A folder's files from the store, or packed now."""
        total = sum(ref.nbytes for ref in checkpoint.tensors[folder].values())
        stage = f"pack {folder}"

        def produce(work: Path) -> tuple[dict[str, Path], dict[str, Any]]:
            count = byte_counter(total, count_bytes(progress, stage, "packed"))
            begins = self.write(checkpoint, plan, folder, work, count)
            return {name: work / name for name in begins}, {"begins": begins}

        result = run_action(cache, self.file_action(checkpoint, plan, folder), produce)
        if result.hit:
            progress.stage(stage, 1)
            progress.done(stage, folder, FROM_STORE)
        return result


def part_folders(plan: Plan) -> list[str]:
    """The folders of the checkpoint whose weights the parts have, in the order they run."""
    return list(dict.fromkeys(part.folder for part in plan.parts))
