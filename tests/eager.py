"""A small bundle without compiled files, and an executor that runs its parts in PyTorch: quick, and exact."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from fluxkiln.artifacts.bundle import write_bundle
from fluxkiln.artifacts.store import open_store
from fluxkiln.compile.bundle import CONFIGS, HOST_CONSTANTS, Bundle, open_bundle
from fluxkiln.export.checkpoint import Checkpoint, TensorReader
from fluxkiln.export.eager import PatchedRunner
from fluxkiln.patches.flux1.inputs import make_constants
from fluxkiln.patches.flux1.kinds import list_parts
from fluxkiln.types import Shapes

SHAPES = Shapes(height=64, width=64, tokens=32)


class Eager:
    """The patched modules as an executor; `order` is what was run and released."""

    name = "eager"
    facts: Mapping[str, str] = {"runtime": "PyTorch", "device": "CPU"}

    def __init__(self, checkpoint: Checkpoint, bundle: Bundle) -> None:
        modulation = "hoisted" if any(part.kind.endswith("_modulated") for part in bundle.parts) else "inline"
        parts = list_parts(checkpoint.configs, "kl", modulation)
        self.components = {part.name: part.component for part in parts}
        self.runner = PatchedRunner(checkpoint, parts, keep=len(parts))
        self.order: list[str] = []

    def __call__(self, part: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        self.order.append(part)
        return self.runner(part, inputs)

    def load(self, component: str) -> None:
        self.order.append(f"load {component}")

    def release(self, component: str) -> None:
        self.order.append(f"release {component}")

    def drop(self, part: str) -> None:
        self.order.append(f"drop {part}")

    def close(self) -> None:
        self.order.append("close")


def make_bundle(checkpoint: Checkpoint, folder: Path, modulation: str = "hoisted") -> Path:
    """A bundle of `checkpoint` whose parts are all in one file that holds nothing."""
    work = folder / "work"
    work.mkdir(parents=True)
    constants, configs = work / "constants.safetensors", work / "configs.json"
    made = make_constants(checkpoint.configs, SHAPES, TensorReader(checkpoint), split=False)
    save_file({name: np.ascontiguousarray(array) for name, array in made.items()}, constants)
    configs.write_text(json.dumps(checkpoint.configs))
    (work / "LICENSE").write_text("a licence")
    (work / "parts.bin").write_bytes(b"\0" * 100_000)
    files = {
        **checkpoint.sidecars,
        HOST_CONSTANTS: constants,
        CONFIGS: configs,
        "LICENSE": work / "LICENSE",
        "parts.bin": work / "parts.bin",
    }
    parts = [
        {
            "name": part.name, "kind": part.kind, "scheme": "BF16", "file": "parts.bin", "net": part.name,
            "digest": "sha256:" + "0" * 64, "size": 1, "inputs": [], "outputs": [],
        }
        for part in list_parts(checkpoint.configs, "kl", modulation)
    ]  # fmt: skip
    manifest = {
        "name": checkpoint.name,
        "target": "cpu",
        "variant": checkpoint.variant,
        "shapes": {"height": SHAPES.height, "width": SHAPES.width, "tokens": SHAPES.tokens},
        "checkpoint": {"source": checkpoint.name, "fingerprint": "sha256:" + "ab" * 32},
        "licence": {"spdx": "Apache-2.0", "file": "LICENSE"},
        "settings": {},
        "parity": {},
        "tools": {},
        "parts": parts,
    }
    write_bundle(folder / "bundle", files, manifest, open_store(folder / "store"), roles={"parts.bin": "binary"})
    return folder / "bundle"


def open_eager(checkpoint: Checkpoint, folder: Path) -> tuple[Bundle, Eager]:
    bundle = open_bundle(folder)
    return bundle, Eager(checkpoint, bundle)
