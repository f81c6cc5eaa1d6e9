"""`training.html`: loss and pictures of a training so far, in one file that needs no network."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.files import write_durably
from fluxkiln.patches.pipeline import GUIDANCE_SCALE
from fluxkiln.train.encode import Encoder
from fluxkiln.train.settings import LoraSettings
from fluxkiln.train.state import TrainingState
from fluxkiln.verify.report.document import page_environment
from fluxkiln.verify.report.plot import Plot, decades, svg

PAGE, PICTURES = "training.html", "progress"
_TEMPLATES = Path(__file__).parent / "templates"
MOST_PICTURES, TICKS = 24, 10


def paint_progress(encoder: Encoder, module: Any, settings: LoraSettings, output: Path, iteration: int) -> Path:
    """Paint the progress prompt with the transformer as it is now, always from the same noise; the PNG's path."""
    import io

    import numpy as np
    import torch
    from PIL import Image

    from fluxkiln.patches.pipeline import quiet
    from fluxkiln.train.encode import CachedSample

    model, shapes, pipe = encoder.checkpoint.model, encoder.shapes, encoder.pipe
    latents: Any = None

    def after_step(_: Any, __: int, ___: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal latents
        latents = tensors["latents"]
        return {}

    encoded = CachedSample(encoder.text(settings.progress_prompt), ()).load_text()
    steps = settings.progress_steps or model.steps[encoder.checkpoint.variant]
    pipe.register_modules(**{model.adapted: module})
    with torch.no_grad(), quiet():
        random = torch.Generator().manual_seed(settings.seed)
        model.denoise(pipe, encoded, shapes, after_step, steps=steps, guidance=GUIDANCE_SCALE, random=random)
    image = np.nan_to_num(model.decode(pipe, shapes, latents.float().numpy()))
    data = io.BytesIO()
    Image.fromarray((image.clip(0, 1) * 255).round().astype(np.uint8)).save(data, "PNG")
    path = output / PICTURES / f"{iteration:07d}.png"
    path.parent.mkdir(exist_ok=True)
    write_durably(path, data.getvalue())
    return path


def write_page(output: Path, checkpoint: Checkpoint, settings: LoraSettings, state: TrainingState) -> Path:
    """Write the page; where there are many pictures, evenly chosen ones."""
    from markupsafe import Markup

    pictures = sorted((output / PICTURES).glob("*.png"))
    done = state.update * settings.grad_accumulate
    pictures = [path for path in pictures if int(path.stem) <= done]
    step = max(1, math.ceil(len(pictures) / MOST_PICTURES))
    context = {
        "model": checkpoint.name,
        "done": done,
        "total": settings.iterations,
        "prompt": settings.progress_prompt,
        "loss": smoothed(state.losses)[-1] if state.losses else None,
        "first": smoothed(state.losses)[0] if state.losses else None,
        "chart": Markup(loss_chart(state.losses, settings.grad_accumulate)),
        "pictures": [(int(path.stem), _data_url(path)) for path in [*pictures[:-1:step], *pictures[-1:]]],
        "facts": {**asdict(settings), **state.facts},
    }
    html = page_environment(_TEMPLATES).get_template("training.html.j2").render(context)
    path = output / PAGE
    write_durably(path, html.encode())
    return path


def loss_chart(losses: Sequence[float], each: int) -> str:
    """Loss over iterations: every update thin, a running mean bold; empty without any.

    Args:
        each: iterations of an update.
    """
    if not losses:
        return ""
    mean = smoothed(losses)
    plot = Plot(*decades(losses), len(losses), right=24)
    every = max(1, math.ceil(len(losses) / TICKS))
    ticks = (plot.tick(index, str((index + 1) * each)) for index in range(every - 1, len(losses), every))
    body = [plot.axes("iterations", "loss"), *ticks]
    body.append(f'<g class="series s1"><path class="run" d="{plot.path(losses)}"/></g>')
    body.append(f'<g class="series s2"><path class="run worst" d="{plot.path(mean)}"/></g>')
    label = f"loss over {len(losses) * each} iterations, logarithmic; at the end {mean[-1]:.3g} in the running mean"
    return svg(plot.width, plot.height, label, body, css="depth")


def smoothed(losses: Sequence[float]) -> list[float]:
    """A running mean over a tenth of all values, at most 50 of them."""
    window = max(1, min(50, len(losses) // 10))
    return [
        sum(losses[max(0, end - window) : end]) / len(losses[max(0, end - window) : end])
        for end in range(1, len(losses) + 1)
    ]


def _data_url(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
