"""ONNX graphs whose weights stay where they are: ONNX Runtime builds, exports of single parts and of components.

ONNX Runtime opens files in or below a graph's own folder only (`external_data.py`). Shards that are not there
get a second name there, which writes none of their bytes: a clone where the file system shares blocks (btrfs,
XFS), a hard link elsewhere. Neither goes from one file system to another.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fluxkiln.artifacts.actions import ActionCache
from fluxkiln.compile.plan import Plan
from fluxkiln.compile.templates import make_template
from fluxkiln.compile.weights import part_packers
from fluxkiln.errors import ResourceError, UsageError
from fluxkiln.export.bindings import bind_part, binding_refs, weight_reader
from fluxkiln.export.checkpoint import Checkpoint, copy_tensors
from fluxkiln.export.fingerprint import check_unchanged, shard_states
from fluxkiln.files import clone, disk_full_named, partial_directory, write_durably
from fluxkiln.progress import Progress
from fluxkiln.quantize.schemes import parse_scheme
from fluxkiln.types import Binding, GraphFormat, Part, Shapes, Template, TensorRef

_GRAPHS = "onnx"
WEIGHTS = "weights"
LINKED_FORMATS: tuple[GraphFormat, ...] = ("onnx23", "onnx17")
Placing = Literal["in place", "clone", "hard link", "copy"]


@dataclass(frozen=True, slots=True)
class GraphFile:
    """A graph that was written.

    Attributes:
        inputs, outputs: name, type and shape of each.
        tensors: initializers that are byte ranges of the checkpoint's files, `referenced` bytes in all.
        copied: weights that had to be written elsewhere, and their bytes.
    """

    name: str
    size: int
    parts: tuple[str, ...]
    inputs: tuple[tuple[str, str, tuple[int, ...]], ...]
    outputs: tuple[tuple[str, str, tuple[int, ...]], ...]
    tensors: int
    referenced: int
    copied: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class LinkedExport:
    """What `export_graphs` wrote. `weights` are the files with weights below `folder`: name -> how it came there."""

    folder: Path
    graphs: tuple[GraphFile, ...]
    weights: Mapping[str, Placing]
    weight_bytes_written: int


def export_graphs(
    checkpoint: Checkpoint,
    files: Mapping[str, Sequence[Part]],
    shapes: Shapes,
    destination: Path,
    progress: Progress,
    *,
    graph_format: GraphFormat = "onnx23",
    copy: bool = False,
) -> LinkedExport:
    """Write graphs whose weights are byte ranges of the checkpoint's shards; no weight byte is written.

    Args:
        files: file name -> the parts it runs one after the other; a single part keeps its own graph.
        destination: a new folder, which gets the graphs and, below `weights`, another name of each shard; or a folder
            that the shards are in or below of already (that of the checkpoint say), which gets the graphs alone.
        copy: the tensors may be copied where neither a clone nor a hard link is possible.

    Raises:
        UsageError: a format that cannot be linked, or a graph is there already.
        ResourceError: the shards can get no name below `destination`, or the disk is full.
        CheckpointError: a shard disappeared or changed meanwhile.
        ExportError, PatchError, CompileError: as the tracing and linking of a part.
    """
    from fluxkiln.export.trace import export_template

    if graph_format not in LINKED_FORMATS:
        raise UsageError(f"graphs with weights are written as {' or '.join(LINKED_FORMATS)}, not as {graph_format}")
    parts = tuple(dict.fromkeys(part for members in files.values() for part in members))
    states = shard_states(ref for name in (part.folder for part in parts) for ref in checkpoint.tensors[name].values())
    holds_shards = _check_reach(states, checkpoint.root, destination, copy)
    with (
        disk_full_named(destination.absolute().parent),
        tempfile.TemporaryDirectory(prefix="fluxkiln-") as traced,
        _graph_folder(destination, files, holds_shards) as folder,
    ):
        kinds = tuple(dict.fromkeys(part.kind for part in parts))
        progress.stage("template", len(kinds))
        templates = {}
        for kind in kinds:
            made = export_template(checkpoint.model, kind, checkpoint.configs, shapes, graph_format, Path(traced))
            templates[kind] = made
            progress.done("template", kind, "traced")
        bindings = {part: bind_part(part, templates[part.kind].slots, checkpoint) for part in parts}
        refs = tuple(dict.fromkeys(ref for bound in bindings.values() for ref in binding_refs(bound, checkpoint)))
        placed, how = _place(refs, checkpoint.root.resolve(), folder, copy, progress)
        progress.stage("graph", len(files))
        graphs = []
        for name, members in files.items():
            bound = {part: (templates[part.kind], bindings[part]) for part in members}
            graphs.append(_write_graph(folder / name, bound, placed, checkpoint, shapes))
            progress.done("graph", name, f"{graphs[-1].tensors} tensors of {len(members)} part(s)")
        check_unchanged({ref.file: states[ref.file] for ref in refs}, refs)
    copied = sum(ref.nbytes for ref in refs) if "copy" in how.values() else 0
    return LinkedExport(destination, tuple(graphs), how, copied + sum(sum(one.copied.values()) for one in graphs))


def link_parts(checkpoint: Checkpoint, plan: Plan, cache: ActionCache, folder: Path) -> dict[str, Path]:
    """Part -> an ONNX file in `folder`, its weights in files below `folder`.

    Without quantization the checkpoint's own shards are put there whole. With it, or with LoRAs in a component, a shard
    would come along for the few tensors that stay as they are, so parts get files with just their own. The arithmetic
    is float32 in any case. Of further sizes there are graphs alone, on the files of the first.
    """
    from fluxkiln.compile.onnx.link import link_weights
    from fluxkiln.compile.onnx.resized import resize_graph

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    whole_shards = not any(scheme.weight_bits for scheme in plan.schemes.values())
    linked: dict[str, Path] = {}
    templates = {}
    for part in plan.parts:
        template = make_template(checkpoint, plan.of(part), cache, part.kind, "onnx23")
        templates[part.name] = template.path
        if part.name != part.base:
            own, target = templates[part.base], folder / f"{part.name}.onnx"
            linked[part.name] = resize_graph(linked[part.base], own, template.path, target)
            continue
        binding = bind_part(part, template.slots, checkpoint)
        refs = {ref.name: ref for ref in binding_refs(binding, checkpoint)}
        changed = any(ref.change for ref in checkpoint.tensors[part.folder].values())
        if whole_shards and not changed:
            refs = {name: replace(ref, file=_beside(ref.file, checkpoint, folder)) for name, ref in refs.items()}
        elif not plan.scheme(part).weight_bits:
            refs = copy_tensors(refs.values(), folder / WEIGHTS / f"{part.name}.safetensors")
        reader = weight_reader(binding, checkpoint)
        target = folder / f"{part.name}.onnx"
        packer_of = part_packers(checkpoint, plan, cache, part, "onnx23")
        linked[part.name] = link_weights(template, binding, refs, reader, plan.scheme(part), target, packer_of)
    return linked


def _check_reach(files: Iterable[Path], root: Path, destination: Path, copy: bool) -> bool:
    """Whether the files lie below `destination` already; ResourceError when they could not be named there."""
    files = tuple(files)
    if all(file.is_relative_to(destination.resolve()) for file in files):
        return True
    place = destination.absolute()
    while not place.exists():
        place = place.parent
    for file in files:
        if not copy and file.stat().st_dev != place.stat().st_dev:
            raise _unreachable(file, root, destination, os.strerror(errno.EXDEV))
    return False


def _unreachable(file: Path, root: Path, folder: Path, why: str) -> ResourceError:
    return ResourceError(
        f"{file} can be neither cloned nor hard-linked into {folder} ({why}), and ONNX Runtime reads weights in or "
        f"below a graph's folder only; give a folder on the checkpoint's file system, or {root} itself, or --copy, "
        "which writes the weights once more"
    )


def _write_graph(
    target: Path,
    parts: Mapping[Part, tuple[Template, Binding]],
    placed: Mapping[TensorRef, TensorRef],
    checkpoint: Checkpoint,
    shapes: Shapes,
) -> GraphFile:
    """Link the parts and write them as one graph, a single one as its own."""
    from fluxkiln.compile.onnx.external_data import Sidecar
    from fluxkiln.compile.onnx.link import link_graph
    from fluxkiln.export.whole import LinkedPart, stitch_parts

    sidecar = Sidecar(target.with_suffix(".bin"))
    linked: list[LinkedPart] = []
    sources: dict[str, int] = {}
    copied: dict[str, int] = {}
    for part, (template, binding) in parts.items():
        refs = {ref.name: placed[ref] for ref in binding_refs(binding, checkpoint)}
        reader = weight_reader(binding, checkpoint)
        one = link_graph(template, binding, refs, reader, parse_scheme("F32"), sidecar)
        sources |= {name: refs[name].nbytes for name in one.in_place.values()}
        beside = {name: f"{part.name}/{name}" for name in one.copied}
        copied |= {beside[name]: size for name, size in one.copied.items()}
        linked.append(LinkedPart(part, one.model, {**one.in_place, **beside}, checkpoint.model.modulation_name(part)))
    model = linked[0].model if len(linked) == 1 else stitch_parts(target.stem, linked)
    facts = {"model": checkpoint.name, "size": f"{shapes.width}x{shapes.height}", "tokens": shapes.tokens}
    for key, value in facts.items():
        model.metadata_props.add(key=f"fluxkiln.{key}", value=str(value))
    data = model.SerializeToString(deterministic=True)
    write_durably(target, data)
    return GraphFile(
        target.name, len(data), tuple(part.name for part in parts), _values(model.graph.input),
        _values(model.graph.output), len(sources), sum(sources.values()), copied,
    )  # fmt: skip


def _values(values: Iterable[Any]) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    from onnx import TensorProto

    found = []
    for value in values:
        kind = value.type.tensor_type
        dtype = TensorProto.DataType.Name(kind.elem_type).lower()
        found.append((value.name, dtype, tuple(dim.dim_value for dim in kind.shape.dim)))
    return tuple(found)


@contextmanager
def _graph_folder(destination: Path, names: Collection[str], holds_shards: bool) -> Iterator[Path]:
    """Where graphs are written: a folder that becomes `destination` at the end, or `destination` as it is."""
    if holds_shards:
        for name in names:
            if (destination / name).exists():
                raise UsageError(f"{destination / name} is there already; remove it first, or give another folder")
        try:
            yield destination
        except BaseException:
            for name in names:
                (destination / name).unlink(missing_ok=True)
            raise
        return
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UsageError(f"{destination} is not empty; give a folder that does not exist yet, or remove it first")
    parent = destination.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with partial_directory(parent, f".{destination.name}") as folder:
        yield folder
        os.rename(folder, destination)


def _place(
    refs: Sequence[TensorRef], root: Path, folder: Path, copy: bool, progress: Progress
) -> tuple[dict[TensorRef, TensorRef], dict[str, Placing]]:
    """Each tensor as it lies below `folder`, and the files there: name -> how it came there."""
    files = tuple(dict.fromkeys(ref.file for ref in refs))
    progress.stage("place", len(files))
    placed: dict[Path, Path] = {}
    how: dict[str, Placing] = {}
    for file in files:
        try:
            placed[file], way = _name_below(file, root, folder)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENOENT):
                raise
            if not copy:
                raise _unreachable(file, root, folder.parent, str(error.strerror)) from error
            return _copy(refs, folder, progress)
        how[str(placed[file].relative_to(folder))] = way
        progress.done("place", file.name, way)
    return {ref: replace(ref, file=placed[ref.file]) for ref in refs}, how


def _beside(file: Path, checkpoint: Checkpoint, folder: Path) -> Path:
    """A shard below `folder`, at its place in the checkpoint: without copying it where the file system allows."""
    root = checkpoint.root.resolve()
    target = _target(file, root, folder)
    if not target.exists():
        try:
            _name_below(file, root, folder)
        except OSError:
            shutil.copyfile(file, target)
    return target


def _target(file: Path, root: Path, folder: Path) -> Path:
    """At its place in the checkpoint; files of a Hugging Face cache lie elsewhere, in `blobs`."""
    return folder / WEIGHTS / (file.relative_to(root) if file.is_relative_to(root) else Path(*file.parts[-2:]))


def _name_below(file: Path, root: Path, folder: Path) -> tuple[Path, Placing]:
    """A name of `file` below `folder` that costs no byte; OSError where there can be none."""
    if file.is_relative_to(folder.resolve()):
        return folder / file.relative_to(folder.resolve()), "in place"
    target = _target(file, root, folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    with file.open("rb") as source, target.open("xb") as opened:
        if clone(source, opened):
            return target, "clone"
    target.unlink()
    os.link(file, target)
    return target, "hard link"


def _copy(
    refs: Sequence[TensorRef], folder: Path, progress: Progress
) -> tuple[dict[TensorRef, TensorRef], dict[str, Placing]]:
    needed, free = sum(ref.nbytes for ref in refs), shutil.disk_usage(folder).free
    if needed > free:
        raise ResourceError(f"{folder.parent} has {free / 1e9:.1f} GB free, the weights take {needed / 1e9:.1f} GB")
    progress.note(f"the weights are copied: {needed / 1e9:.1f} GB")
    shutil.rmtree(folder / WEIGHTS, ignore_errors=True)
    placed: dict[TensorRef, TensorRef] = {}
    how: dict[str, Placing] = {}
    for file in dict.fromkeys(ref.file for ref in refs):
        target = folder / WEIGHTS / f"{len(how) + 1:05d}.safetensors"
        members = [ref for ref in refs if ref.file == file]
        copied = copy_tensors(members, target)
        placed |= {ref: copied[ref.name] for ref in members}
        how[str(target.relative_to(folder))] = "copy"
    return placed, how
