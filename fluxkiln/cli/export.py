"""`fluxkiln export`: templates and bindings, for other compilers and for reading; or graphs with their weights."""

from __future__ import annotations

import fnmatch
import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from fluxkiln.cli.options import (
    PATH,
    build_dir_option,
    read_shape,
    size_option,
    statistics_option,
    tokens_option,
    vae_option,
)
from fluxkiln.cli.output import Output, count_text, json_option, open_progress, seconds_text
from fluxkiln.errors import UsageError
from fluxkiln.patches.model import Model
from fluxkiln.progress import Progress, count_bytes
from fluxkiln.settings import Settings
from fluxkiln.types import GraphFormat, Part, Shapes, Template, find_part
from fluxkiln.verify.report.page import size as size_text

if TYPE_CHECKING:
    from fluxkiln.export.checkpoint import Checkpoint

FORMATS: tuple[GraphFormat, ...] = get_args(GraphFormat)
EXPORT_INDEX = "export.json"


@click.command()
@click.argument("model")
@click.argument("directory", metavar="DIR", type=PATH)
@click.option("--kind", "kinds", multiple=True, metavar="KIND", help="Only this kind of part; may be repeated.")
@click.option(
    "--format",
    "formats",
    multiple=True,
    metavar="|".join(FORMATS),
    help="May be repeated. Default: onnx23, the one ONNX Runtime runs.",
)
@click.option(
    "--whole",
    "components",
    multiple=True,
    metavar="COMPONENT",
    help="A component as one graph with its weights: transformer, text_encoder_2, text_encoder, vae. May be repeated.",
)
@click.option(
    "--part",
    "names",
    multiple=True,
    metavar="PART",
    help="A part as a graph with its weights, 'double.03' or 'single.*' say. May be repeated.",
)
@click.option(
    "--modulation", metavar="inline|hoisted", default="inline",
    help="The transformer's form: hoisted takes what depends on the time step alone out of the blocks.",
)  # fmt: skip
@click.option("--copy", is_flag=True, help="Copy weights where they cannot be read in place.")
@statistics_option
@size_option
@tokens_option
@vae_option
@build_dir_option
@json_option
@click.pass_obj
def export_command(
    output: Output,
    /,
    model: str,
    directory: Path,
    kinds: tuple[str, ...],
    formats: tuple[str, ...],
    components: tuple[str, ...],
    names: tuple[str, ...],
    copy: bool,
    size: str | None,
    tokens: str | None,
    **common: Any,
) -> None:
    """Write the template of every kind of part, and how each part fills its slots.

    MODEL is a synthetic preset, a folder or a Hugging Face id. DIR, empty or not there yet, gets FORMAT/KIND.onnx
    (.pt2, .pt) and export.json: inputs, outputs and slots of each template, and for each part the checkpoint tensors
    and transforms that fill the slots.

    With --whole or --part, DIR gets COMPONENT.onnx and PART.onnx instead: graphs for ONNX Runtime whose weights are
    byte ranges of the checkpoint's own files. These get a second name in DIR/weights, and none of their bytes is
    written; DIR has to be on their file system for that. Where DIR is the checkpoint's own folder, it gets the graphs
    and nothing else.

    ONNX Runtime's constant folding would make a float32 copy of every weight when it opens a graph: turn it off with
    InferenceSession(path, disabled_optimizers=["ConstantFolding"]), and a weight is widened when it is used.
    """
    from fluxkiln.build.make import choose_sizes
    from fluxkiln.build.prepared import choose_components, chosen_parts, find_root, model_of
    from fluxkiln.export.checkpoint import open_checkpoint

    chosen_formats = _parse_formats(formats)
    # of a checkpoint that has not all of them, those that are asked for as a whole
    whole = components if components and not names else None
    settings = Settings("", model, components=whole, **read_shape(size, tokens), **common)
    known_model = model_of(settings)
    _check_kind_names(known_model, kinds, settings)
    linked = bool(components or names)
    if linked:
        _check_graph_options(known_model, components, kinds, chosen_formats)
    elif copy:
        raise UsageError("--copy is for the weights of --whole and --part; templates have none")
    elif directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UsageError(f"{directory} is not empty; give a folder that does not exist yet, or remove it first")
    started = time.perf_counter()
    with open_progress() as progress:
        root = find_root(settings, settings.components, count_bytes(progress, "synthesize", "written"))
        checkpoint = open_checkpoint(root, choose_components(known_model, settings))
        (shapes,) = choose_sizes(settings, checkpoint)
        all_parts = chosen_parts(settings, checkpoint)
        if linked:
            files = _choose_graphs(known_model, all_parts, components, names)
            document = _write_graphs(checkpoint, files, shapes, chosen_formats[0], directory, copy, progress)
            _show_graphs(output, document, directory, time.perf_counter() - started)
            return
        parts = [part for part in all_parts if not kinds or part.kind in kinds]
        index = _write_templates(checkpoint, parts, shapes, chosen_formats, directory, progress)
    seconds = time.perf_counter() - started
    output.document({**index, "directory": str(directory), "seconds": round(seconds, 3)})
    rows = []
    for one in index["templates"]:
        inputs = ", ".join(f"{spec['name']} {'x'.join(map(str, spec['shape']))}" for spec in one["inputs"])
        count = sum(part["kind"] == one["kind"] for part in index["parts"])
        rows.append((one["file"], inputs, len(one["slots"]), count, size_text(one["size"])))
    output.table(("template", "inputs", ">slots", ">parts", ">size"), rows)
    written = f"{count_text(len(index['templates']), 'template')} and {EXPORT_INDEX}"
    output.line(f"\n{directory}: {written} in {seconds_text(seconds)}")


def _show_graphs(output: Output, document: dict[str, Any], directory: Path, seconds: float) -> None:
    cpu = sum(os.times()[:4])
    times = {"seconds": round(seconds, 3), "cpu_seconds": round(cpu, 3)}
    output.document({**document, "directory": str(directory), **times})
    rows = []
    for graph in document["graphs"]:
        sizes = graph["bytes_referenced"], sum(graph["copied"].values()), graph["size"]
        rows.append((graph["file"], len(graph["parts"]), graph["tensors"], *map(size_text, sizes)))
    output.table(("graph", ">parts", ">tensors", ">of weights", ">sidecar", ">size"), rows)
    ways = Counter(document["weights"].values()).items()
    weights = ", ".join(f"{count_text(count, 'file')} ({way})" for way, count in ways)
    output.line(
        f"\n{directory}: {count_text(len(document['graphs']), 'graph')}; weights: {weights}, "
        f"{size_text(document['weight_bytes_written'])} written; {seconds_text(seconds)}, {cpu:.1f} CPU s"
    )


def _parse_formats(names: Sequence[str]) -> tuple[GraphFormat, ...]:
    for name in names:
        if name not in FORMATS:
            raise UsageError(f"no graph format is called {name!r}; there are {', '.join(FORMATS)}")
    return tuple(one for name in dict.fromkeys(names or ("onnx23",)) for one in FORMATS if one == name)


def _check_kind_names(model: Model, names: Sequence[str], settings: Settings) -> None:
    """Refuse a kind that does not exist, or not with this VAE or form of the transformer."""
    forms, decoders = ("inline", "hoisted"), ("kl", "tiny")
    least = {component: dict.fromkeys(keys, 1) for component, keys in model.whole_numbers.items()}
    there = {part.kind for part in model.list_parts(least, settings.vae, settings.modulation)}
    known = {part.kind for form in forms for part in model.list_parts(least, settings.vae, form)}
    legal = [name for name, kind in model.kinds.items() if name in known or kind.component == "vae"]
    for name in names:
        if name not in legal:
            raise UsageError(f"no kind of part is called {name!r}; there are {', '.join(legal)}")
        if name not in there:
            of_vae = model.kinds[name].component == "vae"
            option, given = ("--vae", settings.vae) if of_vae else ("--modulation", settings.modulation)
            other = next(one for one in (decoders if of_vae else forms) if one != given)
            raise UsageError(f"kind {name} is not there with {option} {given}; use {option} {other}")


def _check_graph_options(
    model: Model, components: Sequence[str], kinds: Sequence[str], formats: Sequence[GraphFormat]
) -> None:
    """Refuse a component that does not exist, and options that do not go with --whole and --part."""
    from fluxkiln.compile.onnx.linked import LINKED_FORMATS
    from fluxkiln.export.whole import component_graphs

    for component in components:
        component_graphs((), component, model.components)
    if kinds:
        raise UsageError("--kind chooses templates, not what --whole and --part write; use --part 'single.*' say")
    if len(formats) > 1 or formats[0] not in LINKED_FORMATS:
        raise UsageError(
            f"--whole and --part write one format, {' or '.join(LINKED_FORMATS)}, not {' and '.join(formats)}; "
            "use onnx23 unless something cannot read it"
        )


def _choose_graphs(
    model: Model, parts: Sequence[Part], components: Sequence[str], names: Sequence[str]
) -> dict[str, list[Part]]:
    """Graph file -> the parts it runs, for the components and for the parts whose names match a pattern."""
    from fluxkiln.export.whole import component_graphs

    files: dict[str, list[Part]] = {}
    for component in components:
        graphs = component_graphs(parts, component, model.components)
        files |= {f"{graph}.onnx": list(members) for graph, members in graphs.items()}
    for name in names:
        chosen = [part for part in parts if fnmatch.fnmatchcase(part.name, name)] or [find_part(tuple(parts), name)]
        files |= {f"{part.name}.onnx": [part] for part in chosen}
    return files


def _write_graphs(
    checkpoint: Checkpoint,
    files: Mapping[str, Sequence[Part]],
    shapes: Shapes,
    graph_format: GraphFormat,
    directory: Path,
    copy: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Write graphs with their weights; return what they are made of."""
    from fluxkiln.compile.onnx.linked import export_graphs

    made = export_graphs(checkpoint, files, shapes, directory, progress, graph_format=graph_format, copy=copy)
    return {
        "schema": "fluxkiln.export.graphs/1",
        "model": checkpoint.name,
        "variant": checkpoint.variant,
        "shapes": asdict(shapes),
        "format": graph_format,
        "graphs": [
            {
                "file": graph.name,
                "size": graph.size,
                "parts": list(graph.parts),
                "inputs": [dict(zip(("name", "dtype", "shape"), value, strict=True)) for value in graph.inputs],
                "outputs": [dict(zip(("name", "dtype", "shape"), value, strict=True)) for value in graph.outputs],
                "tensors": graph.tensors,
                "bytes_referenced": graph.referenced,
                "copied": dict(graph.copied),
            }
            for graph in made.graphs
        ],
        "weights": dict(made.weights),
        "weight_bytes_written": made.weight_bytes_written,
        "bytes_written": made.weight_bytes_written + sum(graph.size for graph in made.graphs),
    }


def _write_templates(
    checkpoint: Checkpoint,
    parts: Sequence[Part],
    shapes: Shapes,
    formats: Sequence[GraphFormat],
    destination: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Write templates and index beside `destination` and rename the folder at the end; return the index."""
    from fluxkiln.export.bindings import bind_part
    from fluxkiln.export.trace import export_template
    from fluxkiln.files import disk_full_named, partial_directory

    kinds = tuple(dict.fromkeys(part.kind for part in parts))
    templates: list[dict[str, Any]] = []
    bindings: dict[str, dict[str, Any]] = {part.name: {} for part in parts}
    parent = destination.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with disk_full_named(parent), partial_directory(parent, f".{destination.name}") as folder:
        for graph_format in formats:
            (folder / graph_format).mkdir()
            progress.stage(graph_format, len(kinds))
            for kind in kinds:
                started = time.perf_counter()
                template = export_template(
                    checkpoint.model, kind, checkpoint.configs, shapes, graph_format, folder / graph_format
                )
                templates.append(_describe(template))
                for part in (part for part in parts if part.kind == kind):
                    slots = bind_part(part, template.slots, checkpoint).slots
                    bindings[part.name][graph_format] = [asdict(slot) for slot in slots]
                progress.done(graph_format, kind, f"traced in {time.perf_counter() - started:.1f} s")
        index = {
            "schema": "fluxkiln.export/1",
            "model": checkpoint.name,
            "variant": checkpoint.variant,
            "shapes": asdict(shapes),
            "templates": templates,
            "parts": [
                {"name": part.name, "kind": part.kind, "component": part.component, "bindings": bindings[part.name]}
                for part in parts
            ],
        }
        (folder / EXPORT_INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        os.rename(folder, destination)
    return index


def _describe(template: Template) -> dict[str, Any]:
    return {
        "kind": template.kind,
        "format": template.format,
        "file": f"{template.format}/{template.path.name}",
        "digest": template.digest,
        "size": template.path.stat().st_size,
        **{name: [asdict(spec) for spec in getattr(template, name)] for name in ("inputs", "outputs", "slots")},
    }
