"""The model card of a published bundle: README.md with the metadata that model hubs read.

Source: huggingface.co/docs/hub/model-cards, "Model card metadata".
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from fluxkiln.artifacts.manifest import Manifest
from fluxkiln.artifacts.modelpack import parity_word
from fluxkiln.artifacts.registry.licence import is_from_dev, is_synthetic
from fluxkiln.digests import Json

_BASE = {"dev": "black-forest-labs/FLUX.1-dev", "schnell": "black-forest-labs/FLUX.1-schnell"}


def model_card(
    manifest: Manifest, licence: bytes, *, extra_licences: Sequence[str] = (), signed: bool = False
) -> bytes:
    """README.md of a bundle.

    Args:
        licence: the text in the bundle; random weights of ours name no base model.
        extra_licences: paths of licences of adapters, beside the bundle.
    """
    synthetic, source = is_synthetic(licence), manifest.checkpoint.source
    base = _BASE.get(manifest.variant, source)
    front = ["---", *_licence_lines(manifest, licence)]
    if not synthetic:
        # A fine-tune that was built from its own hub id is the nearer ancestor.
        nearest = source if source.count("/") == 1 and not source.startswith(("/", ".")) else base
        front += [f"base_model: {nearest}", "base_model_relation: quantized"]
    front += [
        "library_name: fluxkiln",
        "pipeline_tag: text-to-image",
        f"tags: [fluxkiln, {json.dumps(manifest.target)}, flux-1-{manifest.variant}]",
        f"fluxkiln: {json.dumps(_facts(manifest))}",
        "---",
    ]
    shapes = manifest.shapes
    size = sum(file.size for file in manifest.files)
    kind = "Random weights in the architecture of" if synthetic else "Compiled from a checkpoint of"
    body = [
        "",
        f"# {manifest.name} for {manifest.target}",
        "",
        f"{kind} FLUX.1-{manifest.variant}, by fluxkiln. It is a bundle: the folder that a runtime loads.",
        "",
        "| | |",
        "|---|---|",
        f"| checkpoint | {_cell(source)}, fingerprint `{manifest.checkpoint.fingerprint}` |",
        f"| target | {_cell(manifest.target)} |",
        f"| schemes | {_cell(_schemes(manifest))} |",
        f"| shapes | {shapes.width}x{shapes.height} pixels, {shapes.tokens} text tokens |",
        f"| size | {size} bytes in {len(manifest.files)} files |",
        f"| parity | {_parity(manifest)} |",
        f"| licence | {_cell(manifest.licence.spdx)}, text in `{manifest.licence.file}` |",
        f"| signature | {'`model.sig`' if signed else 'none'} |",
        "",
        "## Files beside the bundle",
        "",
        "- `manifest.json`: every file with its SHA-256, every part with its scheme.",
        "- `provenance.json`: in-toto statement, SLSA v1: what it was made from, with which settings and tools.",
        *([] if parity_word(manifest.parity) == "unverified" else ["- `report.json`: the parity report."]),
        *(f"- `{path}`: licence of an adapter that is fused into the weights." for path in extra_licences),
        "",
        "Fetch it with `fluxkiln pull`, which checks every byte.",
        "",
    ]
    return "\n".join([*front, *body]).encode()


def _licence_lines(manifest: Manifest, licence: bytes) -> list[str]:
    if is_from_dev(manifest, licence):
        return [
            "license: other",
            "license_name: flux-1-dev-non-commercial-license",
            f"license_link: {json.dumps(manifest.licence.file)}",
        ]
    if manifest.licence.spdx == "Apache-2.0":
        return ["license: apache-2.0"]
    return ["license: other", f"license_name: {json.dumps(manifest.licence.spdx)}",
            f"license_link: {json.dumps(manifest.licence.file)}"]  # fmt: skip


def _facts(manifest: Manifest) -> dict[str, Json]:
    """What no hub has a field for, for programs that read cards. JSON in a line is YAML too."""
    shapes = manifest.shapes
    schemes: list[Json] = [*sorted({part.scheme for part in manifest.parts})]
    return {
        "target": manifest.target,
        "schemes": schemes,
        "shapes": {"height": shapes.height, "width": shapes.width, "tokens": shapes.tokens},
        "parity": parity_word(manifest.parity),
        "checkpoint": manifest.checkpoint.fingerprint,
    }


def _schemes(manifest: Manifest) -> str:
    parts: dict[str, int] = {}
    for part in manifest.parts:
        parts[part.scheme] = parts.get(part.scheme, 0) + 1
    return ", ".join(f"{scheme} ({count} parts)" for scheme, count in sorted(parts.items()))


def _parity(manifest: Manifest) -> str:
    parity = manifest.parity
    rows = parity.get("rows", 0)
    word = parity_word(parity)
    if word == "unverified":
        return "not verified"
    if word == "passed":
        return f"passed: {rows} comparisons with diffusers, all within their gates"
    failed = parity.get("failed_rows", "some")
    return f"**FAILED**: {failed} of {rows} comparisons. {_cell(str(parity.get('failure', '')))}"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
