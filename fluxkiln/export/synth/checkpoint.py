"""Synthetic checkpoints: FLUX.1's architecture and folder layout with random weights, made offline in seconds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from fluxkiln.errors import UsageError
from fluxkiln.export.checkpoint import COMPONENT_CLASSES, PIPELINE_CLASS, Checkpoint
from fluxkiln.export.folders import check_destination, whole_or_nothing
from fluxkiln.export.synth.layout import component_layout
from fluxkiln.patches.flux1.presets import PRESETS, Preset
from fluxkiln.types import TensorRef

Progress = Callable[[int, int], None]

SYNTH_COMPONENTS = tuple(COMPONENT_CLASSES)
_TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
_STEMS = {"text_encoder": "model", "text_encoder_2": "model"}
# As many files as FLUX.1 has; one for the others.
_SHARDS = {"text_encoder_2": 2, "transformer": 3}
_SMALLER = "choose another folder or a smaller preset"

_LICENSE = """\
This is a synthetic checkpoint, written by `fluxkiln synth`.

It has the architecture and the folder layout of FLUX.1, and random numbers in place of weights. It contains no trained
weights and nothing derived from any. It makes no pictures of anything.

The numbers, tokenizers and configuration files of this folder are licensed under the Apache License, Version 2.0
(https://www.apache.org/licenses/LICENSE-2.0). They come without warranty of any kind.
"""


def find_preset(name: str) -> Preset:
    """The preset called `name`; UsageError with the legal names otherwise."""
    if name not in PRESETS:
        raise UsageError(f"no preset is called {name!r}; synthetic presets are {', '.join(PRESETS)}")
    return PRESETS[name]


def parse_components(names: Collection[str] | None) -> tuple[str, ...]:
    """`names` in the order of the pipeline, all components for None; UsageError names an unknown one."""
    if names is None:
        return SYNTH_COMPONENTS
    for name in names:
        if name not in SYNTH_COMPONENTS:
            raise UsageError(f"no component is called {name!r}; synth makes {', '.join(SYNTH_COMPONENTS)}")
    if not names:
        raise UsageError(f"no component was asked for; synth makes {', '.join(SYNTH_COMPONENTS)}")
    return tuple(name for name in SYNTH_COMPONENTS if name in names)


def synthesized_bytes(preset: Preset, components: Collection[str] | None = None) -> int:
    """Bytes of weights that `synthesize` writes."""
    layouts = (component_layout(name, preset.configs[name]) for name in parse_components(components))
    return sum(2 * math.prod(shape) for layout in layouts for shape in layout.values())


def with_tiny_vae(components: Collection[str]) -> tuple[str, ...]:
    """`components` of a pipeline as `synthesize` takes them: a VAE comes with its tiny sister."""
    return parse_components({*components, *(["vae_tiny"] if "vae" in components else [])})


def unwritten_checkpoint(preset: Preset, components: Collection[str]) -> Checkpoint:
    """The checkpoint that `synthesize` would write, by names and shapes; its files do not exist."""
    tensors = {}
    for name in with_tiny_vae(components):
        shapes = component_layout(name, preset.configs[name])
        tensors[name] = {
            tensor: TensorRef(tensor, Path(name), "BF16", tuple(shape), 0, 2 * math.prod(shape))
            for tensor, shape in shapes.items()
        }
    return Checkpoint(
        root=Path(preset.name),
        name=preset.name,
        variant="dev" if preset.configs["transformer"]["guidance_embeds"] else "schnell",
        configs={name: preset.configs[name] for name in (*tensors, "scheduler")},
        tensors=tensors,
        sidecars={},
        licence=None,
    )


def synthesize(
    preset: str,
    destination: Path,
    components: Collection[str] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Path:
    """Write a checkpoint of random bfloat16 weights in the diffusers layout.

    Written beside `destination` and renamed at the end: the folder is there whole or not at all. Memory stays constant.

    Args:
        preset: a name in `PRESETS`.
        destination: a folder that does not exist or is empty.
        components: which of `SYNTH_COMPONENTS` to write; without all of them FluxPipeline cannot load the folder.
        seed: other seeds give other weights.
        progress: called with bytes of weights written and to be written.

    Returns:
        `destination`.

    Raises:
        UsageError: an unknown preset or component, or `destination` has something in it.
        ResourceError: not enough room on the disk.
    """
    from fluxkiln.export.synth.weights import write_component

    chosen = find_preset(preset)
    names = parse_components(components)
    total = synthesized_bytes(chosen, names)
    check_destination(destination)
    written = 0

    def count(nbytes: int) -> None:
        nonlocal written
        written += nbytes
        if progress:
            progress(written, total)

    with whole_or_nothing(destination, total, _SMALLER) as folder:
        _write_small_files(folder, chosen, names)
        for name in names:
            config = chosen.configs[name]
            write_component(
                folder / name,
                _STEMS.get(name, "diffusion_pytorch_model"),
                name,
                component_layout(name, config),
                _SHARDS.get(name, 1),
                seed,
                count,
            )
    return destination


def _write_small_files(folder: Path, preset: Preset, components: Collection[str]) -> None:
    from fluxkiln.export.synth.tokenizers import write_clip_tokenizer, write_t5_tokenizer

    index: dict[str, Any] = {"_class_name": PIPELINE_CLASS, "_diffusers_version": "0.42.1"}
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    _write_json(folder / "scheduler" / "scheduler_config.json", preset.configs["scheduler"])
    for name in components:
        _write_json(folder / name / "config.json", preset.configs[name])
        if name != "vae_tiny":
            library = "transformers" if name in _TOKENIZERS else "diffusers"
            index[name] = [library, COMPONENT_CLASSES[name]]
    if "text_encoder" in components:
        (folder / "tokenizer").mkdir()
        write_clip_tokenizer(folder / "tokenizer", preset.configs["text_encoder"]["vocab_size"])
        index["tokenizer"] = ["transformers", "CLIPTokenizer"]
    if "text_encoder_2" in components:
        (folder / "tokenizer_2").mkdir()
        write_t5_tokenizer(folder / "tokenizer_2", preset.configs["text_encoder_2"]["vocab_size"], max_length=512)
        index["tokenizer_2"] = ["transformers", "T5TokenizerFast"]
    _write_json(folder / "model_index.json", dict(sorted(index.items())))
    (folder / "LICENSE").write_text(_LICENSE, encoding="utf-8")


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
