"""ONNX Runtime builds: every part a graph whose weights are byte ranges of files beside it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from fluxkiln.components import KINDS
from fluxkiln.export.bindings import bind_part, binding_refs, weight_reader
from fluxkiln.export.safetensors_header import copy_tensors
from fluxkiln.progress import Progress
from fluxkiln.quantize.schemes import Scheme
from fluxkiln.stages import BinaryPart, CombinedFile, Kiln, make_template, tell_template

GRAPHS = "onnx"


def link_parts(kiln: Kiln, schemes: Mapping[str, Scheme], folder: Path) -> dict[str, Path]:
    """Part -> an ONNX file in `folder`, its weights in files below `folder`.

    Without quantization the checkpoint's own shards are put there whole. With it a shard would come along for the few
    parts that stay as they are, so those get files with just their own tensors.

    Args:
        schemes: kind -> scheme; only its weight bits count, the arithmetic is float32.
    """
    from fluxkiln.compile.ort_graph import link_weights

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    whole_shards = not any(scheme.weight_bits for scheme in schemes.values())
    linked = {}
    for part in kiln.parts:
        template = make_template(kiln, part.kind, "onnx23")
        binding = bind_part(part, template.slots, kiln.checkpoint)
        refs = {ref.name: ref for ref in binding_refs(binding, kiln.checkpoint)}
        if whole_shards:
            refs = {
                name: replace(ref, file=_beside(ref.file, kiln.checkpoint.root, folder)) for name, ref in refs.items()
            }
        elif not schemes[part.kind].weight_bits:
            refs = copy_tensors(refs.values(), folder / "weights" / f"{part.name}.safetensors")
        reader = weight_reader(binding, kiln.checkpoint)
        target = folder / f"{part.name}.onnx"
        linked[part.name] = link_weights(template, binding, refs, reader, schemes[part.kind], target)
    return linked


def link_components(
    kiln: Kiln, folder: Path, progress: Progress
) -> tuple[tuple[BinaryPart, ...], tuple[CombinedFile, ...], dict[str, Path]]:
    """All of an ONNX Runtime build: parts, the files of the bundle, and part -> graph in `folder`."""
    kinds = kiln.kinds()
    progress.stage("template", len(kinds))
    for kind in kinds:
        tell_template(kiln, kind, "onnx23", progress, "template")
    progress.stage("link", len(kiln.parts))
    graphs = link_parts(kiln, kiln.schemes, folder / GRAPHS)
    binaries = []
    for part in kiln.parts:
        template = make_template(kiln, part.kind, "onnx23")
        blob = kiln.cache.store.add_file(graphs[part.name])
        facts = {
            "inputs": [[spec.name, spec.dtype, list(spec.shape)] for spec in template.inputs],
            "outputs": [[spec.name, spec.dtype, list(spec.shape)] for spec in template.outputs],
            "weight_bytes": 0,
            "instruction_bytes": 0,
            "runtime_bytes": 0,
        }
        binaries.append(BinaryPart(part, part.name, kiln.scheme(part), blob, facts, "linked", blob, blob))
        progress.done("link", part.name, f"{len(KINDS[part.kind].inputs)} inputs, weights in place")
    names = {path: part for part, path in graphs.items()}
    files = []
    for path in sorted(path for path in (folder / GRAPHS).rglob("*") if path.is_file()):
        parts = (names[path],) if path in names else ()
        name = f"{GRAPHS}/{path.relative_to(folder / GRAPHS)}"
        files.append(CombinedFile(name, kiln.cache.store.add_file(path), parts))
    return tuple(binaries), tuple(files), graphs


def _beside(file: Path, root: Path, folder: Path) -> Path:
    """A shard below `folder`, at its place in the checkpoint: a hard link where the file system allows, else a copy."""
    relative = file.relative_to(root) if file.is_relative_to(root) else Path(file.parent.name) / file.name
    target = folder / "weights" / relative
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, target)
        except OSError:
            shutil.copyfile(file, target)
    return target
