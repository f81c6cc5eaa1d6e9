"""full-dev's transformer cast from stored moulds, without and with a LoRA over all linear layers of all its blocks."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench.figure import WORK, Figure, Run, fluxkiln, gigabytes, ratio, run
from bench.full import MODEL, NO_COMPILER, build
from fluxkiln.export.checkpoint import open_checkpoint
from fluxkiln.export.source import resolve_model
from fluxkiln.train.adapters import adapted_layers

COMPONENT, RANK = "transformer", 16
# the size has no part in a cast; a small one compiles faster
SMALL = ("--size", "256x256", "--tokens", "128")
SCHEMES = ("W4BF16", "W4BF16-rtn")


def measure() -> Figure:
    root = resolve_model(MODEL, WORK / "models", components=(COMPONENT,))
    rows = []
    with tempfile.TemporaryDirectory(dir=WORK) as folder:
        place = Path(folder)
        layers = write_lora(root, place / "style.safetensors")
        # methods of rounding share their moulds
        build(COMPONENT, place / "cold", more=(*SMALL, "--scheme", SCHEMES[0]))
        moulds, store = place / "moulds.tar", str(place / "cold" / "store")
        run(fluxkiln("mould", "export", str(moulds), "--store", store, "--json"))
        shutil.rmtree(place / "cold")
        for scheme in SCHEMES:
            before = size_below(WORK / "models")
            plain = from_moulds(place / "plain", moulds, scheme)
            with_lora = from_moulds(place / "lora", moulds, scheme, "--lora", str(place / "style.safetensors"))
            written = size_below(WORK / "models") - before
            casts = [float(one.document()["timings"]["cast"]) for one in (plain, with_lora)]
            rows.append(
                (
                    scheme,
                    *(f"{seconds:.0f} s" for seconds in casts),
                    ratio(casts[1], casts[0]),
                    *(f"{one.seconds:.0f} s" for one in (plain, with_lora)),
                    *(gigabytes(one.peak_bytes) for one in (plain, with_lora)),
                    str(written),
                )
            )
    return Figure(
        f"A LoRA over all blocks of {MODEL}",
        (
            "scheme", "cast", "cast with the LoRA", "ratio", "build", "build with the LoRA", "peak",
            "peak with the LoRA", "bytes of checkpoint written",
        ),
        tuple(rows),
        (
            f"`fluxkiln build bm1684x --components {COMPONENT} --no-verify {' '.join(SMALL)}`, once plain and once "
            f"with `--lora`, each with moulds in a new store and no compiler. LoRA: rank {RANK}, bfloat16, {layers} "
            "layers. A build with a LoRA reads every changed number once more before it casts, to see that it is "
            "finite and to say how much each block changes.",
        ),
    )  # fmt: skip


def write_lora(root: Path, file: Path) -> int:
    """A LoRA of random numbers for every linear layer of every block; returns how many these are."""
    checkpoint = open_checkpoint(root, (COMPONENT,))
    layers = adapted_layers(checkpoint, RANK, -1).names
    drawn, tensors = torch.Generator().manual_seed(0), {}
    for layer in layers:
        out, width = checkpoint.tensors[COMPONENT][f"{layer}.weight"].shape
        for half, shape in (("A", (RANK, width)), ("B", (out, RANK))):
            values = torch.randn(shape, generator=drawn) / 100
            tensors[f"{COMPONENT}.{layer}.lora_{half}.weight"] = values.to(torch.bfloat16)
    save_file(tensors, file)
    return len(layers)


def from_moulds(folder: Path, moulds: Path, scheme: str, *more: str) -> Run:
    """A build in a new store that has the moulds, without a compiler; the folder is removed."""
    run(fluxkiln("mould", "import", str(moulds), "--store", str(folder / "store"), "--json"))
    made = build(COMPONENT, folder, NO_COMPILER, more=(*SMALL, "--scheme", scheme, *more))
    shutil.rmtree(folder)
    return made


def size_below(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
