"""Synthetic checkpoints: FLUX.1's architecture and folder layout with random weights, made offline in seconds."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

from fluxkiln.errors import UsageError
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.export.folders import check_destination, whole_or_nothing
from fluxkiln.patches.model import Model, Preset
from fluxkiln.patches.registry import all_presets
from fluxkiln.progress import OnBytes, byte_counter
from fluxkiln.types import TensorRef

# As many files as FLUX.1 has; one for the others.
_SHARDS = {"text_encoder_2": 2, "transformer": 3}
_SMALLER = "choose another folder or a smaller preset"

_LICENSE = """\
This is a synthetic checkpoint, written by `fluxkiln synth`.

It has the architecture and the folder layout of {title}, and random numbers in place of weights. It contains no trained
weights and nothing derived from any. It makes no pictures of anything.

The numbers, tokenizers and configuration files of this folder are licensed under the Apache License, Version 2.0
(https://www.apache.org/licenses/LICENSE-2.0). They come without warranty of any kind.
"""


def find_preset(name: str) -> tuple[Model, Preset]:
    """The preset called `name` and its model; UsageError with the legal names otherwise."""
    presets = all_presets()
    if name not in presets:
        raise UsageError(f"no preset is called {name!r}; synthetic presets are {', '.join(presets)}")
    return presets[name]


def parse_components(model: Model, names: Collection[str] | None) -> tuple[str, ...]:
    """`names` in the order of the pipeline, all folders with weights for None; UsageError names an unknown one."""
    known = tuple(model.classes)
    if names is None:
        return known
    for name in names:
        if name not in known:
            raise UsageError(f"no component is called {name!r}; synth makes {', '.join(known)}")
    if not names:
        raise UsageError(f"no component was asked for; synth makes {', '.join(known)}")
    return tuple(name for name in known if name in names)


def synthesized_bytes(preset: str, components: Collection[str] | None = None) -> int:
    """Bytes of weights that `synthesize` writes."""
    model, found = find_preset(preset)
    layouts = (model.layout(name, found.configs[name]) for name in parse_components(model, components))
    return sum(2 * math.prod(shape) for layout in layouts for shape in layout.values())


def with_sisters(model: Model, components: Collection[str]) -> tuple[str, ...]:
    """`components` of a pipeline as `synthesize` takes them: a VAE comes with its tiny sister."""
    return tuple(name for name in model.classes if any(name in (one, f"{one}_tiny") for one in components))


def unwritten_checkpoint(preset: str, components: Collection[str]) -> Checkpoint:
    """The checkpoint that `synthesize` would write, by names and shapes; its files do not exist."""
    (model, found), tensors = find_preset(preset), {}
    for name in with_sisters(model, components):
        shapes = model.layout(name, found.configs[name])
        tensors[name] = {
            tensor: TensorRef(tensor, Path(name), "BF16", tuple(shape), 0, 2 * math.prod(shape))
            for tensor, shape in shapes.items()
        }
    configs = {name: found.configs[name] for name in (*tensors, "scheduler")}
    return Checkpoint(Path(preset), preset, model.variant(found.configs), configs, tensors, {}, None, model)


def synthesize(
    preset: str,
    destination: Path,
    components: Collection[str] | None = None,
    seed: int = 0,
    progress: OnBytes | None = None,
) -> Path:
    """Write a checkpoint of random bfloat16 weights in the diffusers layout.

    Written beside `destination` and renamed at the end: the folder is there whole or not at all. Memory stays constant.

    Args:
        preset: see `find_preset`.
        destination: a folder that does not exist or is empty.
        components: which folders with weights to write; without all of them diffusers cannot load the whole.
        seed: other seeds give other weights.
        progress: called with bytes of weights written and to be written.

    Returns:
        `destination`.

    Raises:
        UsageError: an unknown preset or component, or `destination` has something in it.
        ResourceError: not enough room on the disk.
    """
    from fluxkiln.export.synth.weights import tensor_bits, write_component

    model, chosen = find_preset(preset)
    names = parse_components(model, components)
    total = synthesized_bytes(preset, names)
    check_destination(destination)
    count = byte_counter(total, progress)
    with whole_or_nothing(destination, total, _SMALLER) as folder:
        _write_small_files(folder, model, chosen, names)
        for name in names:
            stem = "model" if name in model.tokenizers else "diffusion_pytorch_model"
            layout = model.layout(name, chosen.configs[name])
            draw = partial(tensor_bits, model.weight_rules[name], name, seed)
            write_component(folder / name, stem, layout, _SHARDS.get(name, 1), draw, count)
    return destination


def _write_small_files(folder: Path, model: Model, preset: Preset, components: Collection[str]) -> None:
    index: dict[str, Any] = {"_class_name": model.pipeline_class, "_diffusers_version": "0.42.1"}
    index["scheduler"] = ["diffusers", preset.configs["scheduler"]["_class_name"]]
    _write_json(folder / "scheduler" / "scheduler_config.json", preset.configs["scheduler"])
    for name in components:
        _write_json(folder / name / "config.json", preset.configs[name])
        if name in model.components:
            index[name] = [model.libraries[name], model.classes[name]]
    tokenizers = model.write_tokenizers(folder, {name: preset.configs[name] for name in components})
    index |= {name: ["transformers", found] for name, found in tokenizers.items()}
    _write_json(folder / "model_index.json", dict(sorted(index.items())))
    (folder / "LICENSE").write_text(_LICENSE.format(title=model.title), encoding="utf-8")


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
