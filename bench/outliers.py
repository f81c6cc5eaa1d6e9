"""Weights of wide-dev as drawn by default and with the statistics of FLUX.1, beside what is published of FLUX.1-dev."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bench.figure import WORK, Figure, cpu_seconds, ratio
from fluxkiln.export.checkpoint import open_checkpoint, read_tensor
from fluxkiln.export.source import resolve_model
from fluxkiln.export.synth import synthesize
from fluxkiln.settings import DEFAULT_PROMPT, DEFAULT_STATISTICS

MODEL, TIMES = "wide-dev", 3
SIDE, TOKENS, STEPS = 256, 128, 28
# What is measured -> its name, and as it is published; `fluxkiln/patches/flux1/statistics.py` says where.
PUBLISHED = {
    "image": ("image behind its embedder: mean size, range", "0.24, -5.3 to 6.2"),
    "text": ("text behind its embedder", "0.76, -26.5 to 37.5"),
    "block": ("image behind block 0", "0.42, -35.0 to 40.0"),
    "channels": ("its two largest channels", "154, 1446"),
    "median": ("inputs of a layer, maxima of channels: largest / median", ""),
    "smallest": ("largest / smallest", "27 (one layer)"),
    "spread": ("weights, maxima of input channels: largest / smallest", "4.2 (one layer)"),
    "kurtosis": ("kurtosis of weights", ""),
    "sums": ("what blocks add at step 14 and 28, of that at step 1", "1.87, 1.40"),
    "seconds": ("CPU time to draw the transformer", ""),
}


def measure() -> Figure:
    found = {}
    for name in (DEFAULT_STATISTICS, "flux"):
        root = resolve_model(MODEL, WORK / "models", statistics=name)
        found[name] = {**_activations(root), **_weights(root), "seconds": _seconds(name)}
    slowest = found[DEFAULT_STATISTICS]["seconds"]
    rows = [
        (label, known, *(ratio(one[key], slowest) if key == "seconds" else one[key] for one in found.values()))
        for key, (label, known) in PUBLISHED.items()
    ]
    return Figure(
        "What is drawn for wide-dev, by default and with the statistics of FLUX.1",
        ("", "published", *found),
        tuple(rows),
        (
            f"diffusers in float32, {SIDE}x{SIDE}, {TOKENS} tokens, {STEPS} steps, seed 0; streams, inputs: at step 1. "
            "Layers and weights: the median over the matrices of both blocks. Kurtosis is 1.8 for uniform numbers and "
            "3 for Gaussian ones. The blocks' sum is what all blocks add to the image stream, as MagCache measures it. "
            f"The time is the least of {TIMES}.",
        ),
    )


def _activations(root: Path) -> dict[str, str]:
    import torch
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(root, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    transformer, streams, inputs, sums = pipe.transformer, {}, {}, []
    first, last = transformer.transformer_blocks[0], transformer.single_transformer_blocks[-1]

    def keep(name: str) -> Any:
        def hook(module: Any, given: Any, made: Any) -> None:
            streams.setdefault(name, made[1] if isinstance(made, tuple) else made)

        return hook

    def look(module: Any, given: Any) -> None:
        inputs.setdefault(module, given[0].flatten(0, -2).abs().amax(0).numpy())

    def add(module: Any, given: Any, made: Any) -> None:
        sums.append(float((made[1] - begin[0]).norm(dim=-1).mean()))

    begin: list[Any] = [None]
    first.register_forward_pre_hook(lambda _, a, k: begin.__setitem__(0, k["hidden_states"]), with_kwargs=True)
    for name, module in (("image", transformer.x_embedder), ("text", transformer.context_embedder), ("block", first)):
        module.register_forward_hook(keep(name))
    last.register_forward_hook(add)
    for module in _linears(first, last):
        module.register_forward_pre_hook(look)
    random = torch.Generator().manual_seed(0)
    size = {"height": SIDE, "width": SIDE, "max_sequence_length": TOKENS}
    pipe(DEFAULT_PROMPT, **size, num_inference_steps=STEPS, output_type="latent", generator=random)
    peaks = list(inputs.values())
    largest = streams["block"].abs().mean((0, 1)).topk(2).indices.tolist()
    return {
        **{name: _stream(values) for name, values in streams.items()},
        "channels": ", ".join(map(str, sorted(largest))),
        "median": f"{np.median([one.max() / np.median(one) for one in peaks]):.1f}",
        "smallest": f"{np.median([one.max() / one.min() for one in peaks]):.0f}",
        "sums": f"{sums[STEPS // 2 - 1] / sums[0]:.2f}, {sums[-1] / sums[0]:.2f}",
    }


def _linears(*blocks: Any) -> list[Any]:
    """The linear layers of blocks, those of AdaLN left out."""
    return [
        module
        for block in blocks
        for name, module in block.named_modules()
        if type(module).__name__ == "Linear" and "norm" not in name
    ]


def _stream(values: Any) -> str:
    return f"{values.abs().mean():.2f}, {values.min():.1f} to {values.max():.1f}"


def _weights(root: Path) -> dict[str, str]:
    spreads, kurtoses = [], []
    for name, ref in open_checkpoint(root, ("transformer",)).tensors["transformer"].items():
        if "blocks." in name and name.endswith(".weight") and len(ref.shape) == 2 and "norm" not in name:
            weight = read_tensor(ref).astype(np.float32)
            peaks, squares = np.abs(weight).max(0), np.square(weight)
            spreads.append(peaks.max() / peaks.min())
            kurtoses.append(np.square(squares).mean() / squares.mean() ** 2)
    return {"spread": f"{np.median(spreads):.1f}", "kurtosis": f"{np.median(kurtoses):.1f}"}


def _seconds(statistics: str) -> float:
    def draw() -> None:
        with tempfile.TemporaryDirectory(dir=WORK) as folder:
            synthesize(MODEL, Path(folder) / "m", ("transformer",), statistics=statistics)

    return cpu_seconds(draw, TIMES)
