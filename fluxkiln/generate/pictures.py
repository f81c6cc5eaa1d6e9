"""Images as files: PNGs that say what they were made from, and grids of them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fluxkiln.compile.bundle import Bundle
    from fluxkiln.generate.painter import Request

MARGIN = 8  # pixels between the images of a grid


def describe_picture(bundle: Bundle, executor: str, request: Request) -> dict[str, str]:
    """What a PNG carries: prompt, seed, steps, guidance, the bundle's name and digest, and what ran it."""
    from fluxkiln import __version__
    from fluxkiln.generate.painter import default_steps
    from fluxkiln.patches.pipeline import GUIDANCE_SCALE

    guidance = GUIDANCE_SCALE if request.guidance is None else request.guidance
    return {
        "prompt": request.prompt,
        **({"prompt_2": request.prompt_2} if request.prompt_2 else {}),
        "seed": str(request.seed),
        "steps": str(request.steps or default_steps(bundle)),
        **({"guidance": f"{guidance:g}"} if bundle.takes_guidance else {}),
        "model": f"{bundle.model.title}-{bundle.manifest.variant} {bundle.manifest.checkpoint.source}",
        "bundle": bundle.digest,
        "bundle_name": f"{bundle.manifest.name} for {bundle.manifest.target}",
        "executor": executor,
        "Software": f"fluxkiln {__version__}",
    }


def png_bytes(image: NDArray[Any], facts: Mapping[str, str]) -> bytes:
    """A PNG of an image [height, width, 3] uint8, with `facts` as its text chunks."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, text in facts.items():
        info.add_itxt(name, text)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def read_facts(path: Path) -> dict[str, str]:
    """The text chunks of a PNG."""
    from PIL import Image

    with Image.open(path) as image:
        image.load()
        return {name: str(text) for name, text in getattr(image, "text", {}).items()}


def make_grid(images: Sequence[NDArray[Any]], rows: int) -> NDArray[Any]:
    """Images of one size [height, width, 3] uint8 in `rows` rows, filled row by row, white where there is none.

    Raises:
        UsageError: more rows than images, or none.
    """
    import numpy as np

    if not 1 <= rows <= len(images):
        raise UsageError(f"{rows} rows for {len(images)} images: give from 1 to {len(images)}")
    columns = -(-len(images) // rows)
    height, width, _ = images[0].shape
    shape = (rows * (height + MARGIN) - MARGIN, columns * (width + MARGIN) - MARGIN, 3)
    grid = np.full(shape, 255, np.uint8)
    for number, image in enumerate(images):
        top, left = (number // columns) * (height + MARGIN), (number % columns) * (width + MARGIN)
        grid[top : top + height, left : left + width] = image
    return grid
