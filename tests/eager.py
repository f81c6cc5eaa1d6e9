"""A small bundle without compiled files, and an executor that runs its parts in PyTorch: quick, and exact."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from fluxkiln.artifacts.bundle import write_bundle
from fluxkiln.artifacts.store import open_store
from fluxkiln.compile.bundle import CONFIGS, HOST_CONSTANTS, Bundle
from fluxkiln.compile.opener import open_bundle
from fluxkiln.export.checkpoint import Checkpoint, TensorReader
from fluxkiln.export.eager import PatchedRunner
from fluxkiln.files import digest_file
from fluxkiln.patches.flux1.inputs import make_constants, part_inputs
from fluxkiln.patches.flux1.kinds import list_parts
from fluxkiln.types import Shapes, TensorSpec

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
    """A bundle of `checkpoint` whose parts are graphs that take and give what they must, and compute nothing."""
    work = folder / "work"
    work.mkdir(parents=True)
    constants, configs = work / "constants.safetensors", work / "configs.json"
    made = make_constants(checkpoint.configs, SHAPES, TensorReader(checkpoint), split=False)
    save_file({name: np.ascontiguousarray(array) for name, array in made.items()}, constants)
    configs.write_text(json.dumps(checkpoint.configs))
    (work / "LICENSE").write_text("a licence")
    files = {
        **checkpoint.sidecars,
        HOST_CONSTANTS: constants,
        CONFIGS: configs,
        "LICENSE": work / "LICENSE",
    }
    parts = []
    for part in list_parts(checkpoint.configs, "kl", modulation):
        inputs = part_inputs(part.kind, checkpoint.configs, SHAPES)
        outputs = tuple(TensorSpec(name, inputs[0].shape) for name in part.traits.outputs)
        graph = files[f"onnx/{part.name}.onnx"] = work / f"{part.name}.onnx"
        write_graph(graph, inputs, outputs)
        digest, size = digest_file(graph)
        parts.append(
            {
                "name": part.name, "kind": part.kind, "scheme": "BF16", "file": f"onnx/{part.name}.onnx",
                "net": part.name, "digest": digest, "size": size,
                "inputs": [asdict(spec) for spec in inputs], "outputs": [asdict(spec) for spec in outputs],
            }
        )  # fmt: skip
    manifest = {
        "name": checkpoint.name,
        "target": "cpu",
        "model": checkpoint.model.name,
        "variant": checkpoint.variant,
        "shapes": {"height": SHAPES.height, "width": SHAPES.width, "tokens": SHAPES.tokens},
        "checkpoint": {"source": checkpoint.name, "fingerprint": "sha256:" + "ab" * 32},
        "licence": {"spdx": "Apache-2.0", "file": "LICENSE"},
        "settings": {"components": list(checkpoint.model.components), "vae": "kl", "modulation": modulation},
        "parity": {"about": {"weights": "random (synthetic): no kiln"}},
        "tools": {},
        "parts": parts,
    }
    write_bundle(folder / "bundle", files, manifest, open_store(folder / "store"))
    return folder / "bundle"


def write_graph(path: Path, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
    """An ONNX graph without nodes."""
    import onnx

    def values(specs: tuple[TensorSpec, ...]) -> list[Any]:
        types = {"float32": onnx.TensorProto.FLOAT, "int64": onnx.TensorProto.INT64}
        return [onnx.helper.make_tensor_value_info(spec.name, types[spec.dtype], spec.shape) for spec in specs]

    graph = onnx.helper.make_graph([], path.stem, values(inputs), values(outputs))
    path.write_bytes(onnx.helper.make_model(graph).SerializeToString(deterministic=True))


def open_eager(checkpoint: Checkpoint, folder: Path) -> tuple[Bundle, Eager]:
    bundle = open_bundle(folder)
    return bundle, Eager(checkpoint, bundle)
