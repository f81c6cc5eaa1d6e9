"""Synthetic checkpoints: FLUX.1's architecture and folder layout with random weights, made offline in seconds."""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fluxkiln.artifacts.types import TensorRef
from fluxkiln.errors import ResourceError, UsageError
from fluxkiln.export.checkpoint import COMPONENT_CLASSES, PIPELINE_CLASS, Checkpoint
from fluxkiln.export.synth_layout import component_layout
from fluxkiln.export.synth_presets import PRESETS, Preset

Progress = Callable[[int, int], None]

SYNTH_COMPONENTS = tuple(COMPONENT_CLASSES)
_TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
_STEMS = {"text_encoder": "model", "text_encoder_2": "model"}
# As many files as FLUX.1 has; one for the others.
_SHARDS = {"text_encoder_2": 2, "transformer": 3}
# Leave this much of the disk to others.
_SPARE_BYTES = 64 << 20
_PARTIAL = ".partial"

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
    from fluxkiln.export.synth_weights import write_component

    chosen = find_preset(preset)
    names = parse_components(components)
    total = synthesized_bytes(chosen, names)
    _check_destination(destination)
    written = 0

    def count(nbytes: int) -> None:
        nonlocal written
        written += nbytes
        if progress:
            progress(written, total)

    with _whole_or_nothing(destination, total) as folder:
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
    from fluxkiln.export.synth_tokenizers import write_clip_tokenizer, write_t5_tokenizer

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


def _check_destination(destination: Path) -> None:
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UsageError(f"{destination} is not empty; give a folder that does not exist yet, or remove it first")


@contextmanager
def _whole_or_nothing(destination: Path, nbytes: int) -> Iterator[Path]:
    """A locked folder beside `destination` that takes its place when the block ends, and vanishes when it raises."""
    parent = destination.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(parent, destination.name)
    free = shutil.disk_usage(parent).free
    if free < nbytes + _SPARE_BYTES:
        raise ResourceError(
            f"{parent} has {free / 1e9:.1f} GB free, {destination.name} takes {nbytes / 1e9:.1f} GB; free some space, "
            f"or choose another folder or a smaller preset"
        )
    partial = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=parent))
    partial.chmod(0o777 & ~_umask())
    lock = os.open(partial, os.O_RDONLY)
    try:
        # Tells other processes that this folder is being written; the kernel drops it when this process dies.
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Only now under the name that `_remove_stale` looks for.
        partial = partial.rename(f"{partial}{_PARTIAL}")
        yield partial
        try:
            os.rename(partial, destination)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise UsageError(
                f"{destination} was filled by another process meanwhile; use it, or remove it first"
            ) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ResourceError(
            f"the disk of {parent} is full after part of {nbytes / 1e9:.1f} GB; free some space"
        ) from error
    finally:
        os.close(lock)
        # After a successful rename there is nothing left under this name.
        shutil.rmtree(partial, ignore_errors=True)


def _remove_stale(parent: Path, name: str) -> None:
    """Remove what killed processes left: partial folders of `name` that nobody holds locked."""
    for path in parent.glob(f".{glob.escape(name)}.*{_PARTIAL}"):
        # Gone meanwhile, or locked by the process that writes it.
        with suppress(FileNotFoundError, BlockingIOError):
            lock = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
