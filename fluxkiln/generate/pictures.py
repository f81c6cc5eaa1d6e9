"""Pictures of many prompts, by diffusers or by the parts of a bundle: what the judge of scenes is given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.export.checkpoint import open_checkpoint
from fluxkiln.generate.painter import Painter, Request, paint
from fluxkiln.patches.pipeline import GUIDANCE_SCALE, quiet
from fluxkiln.progress import Progress, Silent
from fluxkiln.scenes.grammar import Prompt
from fluxkiln.types import Shapes

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Pictures that diffusers' pipeline makes at once.
_BATCH = 8


def paint_with_diffusers(
    root: Path, shapes: Shapes, requests: Sequence[Request], progress: Progress | None = None
) -> Iterator[NDArray[Any]]:
    """Images [height, width, 3] uint8 by diffusers' own pipeline of a checkpoint, in float32.

    Args:
        requests: all with the same steps and guidance.
    """
    import torch

    checkpoint, progress = open_checkpoint(root), progress or Silent()
    progress.stage("paint", len(requests))
    with quiet():
        pipe = checkpoint.model.load_pipeline_class().from_pretrained(root, dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
    for first in range(0, len(requests), _BATCH):
        batch = requests[first : first + _BATCH]
        steps, guidance = batch[0].steps or checkpoint.model.steps[checkpoint.variant], batch[0].guidance
        images = pipe(
            prompt=[request.prompt for request in batch],
            generator=[torch.Generator("cpu").manual_seed(request.seed) for request in batch],
            num_inference_steps=steps,
            guidance_scale=GUIDANCE_SCALE if guidance is None else guidance,
            height=shapes.height,
            width=shapes.width,
            max_sequence_length=shapes.tokens,
            output_type="np",
        ).images
        for image in images:
            progress.done("paint", "image", f"{steps} steps by diffusers")
            yield (image * 255).round().astype("uint8")


def paint_with_parts(
    painter: Painter, requests: Sequence[Request], progress: Progress | None = None
) -> Iterator[NDArray[Any]]:
    """Images [height, width, 3] uint8 by a bundle's parts."""
    return (picture.image for picture in paint(painter, requests, progress))


def requests_for(asked: Sequence[Prompt], steps: int | None, guidance: float | None, seed: int) -> list[Request]:
    """One image for each prompt, each with a seed of its own."""
    return [Request(prompt.text, seed + i, steps=steps, guidance=guidance) for i, prompt in enumerate(asked)]
