"""Pictures with their prompts: a folder with `train.jsonl`, or what Hugging Face's `datasets` loads.

Only names and prompts are in memory; a picture is read when it is asked for.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.documents import SMALL, read_object
from fluxkiln.errors import DatasetError, ToolchainError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

LINES = "train.jsonl"
_PROMPTS = ("prompt", "text", "caption")
_EXAMPLE = '{"image": "00.png", "prompt": "a kiln at night"}'


@dataclass(frozen=True, slots=True)
class Sample:
    """A picture and its prompt. `where` names it for errors: file and line, or row; `read` gives its file's bytes."""

    where: str
    prompt: str
    read: Callable[[], bytes]

    def open(self) -> tuple[str, Image]:
        """sha256 of the file's bytes, and the picture; its pixels are decoded when they are asked for."""
        from PIL import Image

        with self.readable():
            data = self.read()
            return hashlib.sha256(data).hexdigest(), Image.open(io.BytesIO(data))

    @contextmanager
    def readable(self) -> Iterator[None]:
        """Read or decode the picture in this block: DatasetError where it is missing or broken."""
        try:
            yield
        except Exception as error:  # whatever a decoder raises about bytes that it does not like
            reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
            raise DatasetError(
                f"{self.where}: the picture cannot be read ({reason}); replace the file or remove the line"
            ) from error


def read_dataset(spec: str) -> tuple[Sample, ...]:
    """The samples of a folder with `train.jsonl`, else of a data set that `datasets` finds by this path or name.

    Raises:
        DatasetError: a line that is wrong, a picture that is missing, or no samples.
        UsageError: there is no such data set. ToolchainError: `datasets` is needed and not installed.
    """
    folder = Path(spec).expanduser()
    samples = _read_lines(folder) if (folder / LINES).is_file() else _load_hub(spec, folder)
    if not samples:
        raise DatasetError(f"{spec} has no pictures; write a line for each into {LINES}: {_EXAMPLE}")
    return samples


def _read_lines(folder: Path) -> tuple[Sample, ...]:
    samples = []
    with (folder / LINES).open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                samples.append(_parse_line(folder, f"{folder / LINES} line {number}", line))
    return tuple(samples)


def _parse_line(folder: Path, where: str, line: bytes) -> Sample:
    found = read_object(line, where, error=DatasetError, remedy=f"a line is an object like {_EXAMPLE}", limits=SMALL)
    image, prompt = found.get("image"), found.get("prompt")
    for key, value in (("image", image), ("prompt", prompt)):
        if not isinstance(value, str) or not value.strip():
            raise DatasetError(f"{where} has {value!r} as {key}; a line is an object like {_EXAMPLE}")
    path = folder / str(image)
    if not path.is_file():
        raise DatasetError(f"{where} names {image}, which is not in {folder}; add the picture or remove the line")
    return Sample(f"{where} ({image})", str(prompt), path.read_bytes)


def _load_hub(spec: str, folder: Path) -> tuple[Sample, ...]:
    try:
        import datasets
    except ImportError as error:
        raise ToolchainError(
            f"{spec} has no {LINES}, so Hugging Face's `datasets` is needed ({error}); install it: pip install "
            f"'fluxkiln[train]', or write {LINES}"
        ) from error
    datasets.disable_progress_bars()
    try:
        loaded: Any = datasets.load_dataset(spec, split="train")
    except Exception as error:  # whatever the hub's library raises; its text may hold signed addresses
        kind = "folder without it" if folder.is_dir() else "name that cannot be fetched, and no folder"
        raise UsageError(
            f"{spec} is no data set: a {kind} ({type(error).__name__}); give a folder with {LINES}, or the id of a "
            "Hugging Face data set with columns image and prompt"
        ) from error
    column = next((name for name in _PROMPTS if name in loaded.column_names), None)
    if column is None or "image" not in loaded.column_names:
        raise DatasetError(
            f"{spec} has the columns {', '.join(loaded.column_names)}; image and prompt are needed: rename them"
        )
    if not isinstance(loaded.features["image"], datasets.Image):
        raise DatasetError(f"{spec} has {loaded.features['image']} in its column image; pictures are needed there")
    raw = loaded.cast_column("image", datasets.Image(decode=False))

    def reader(row: int) -> Callable[[], bytes]:
        def read() -> bytes:
            cell = raw[row]["image"]
            return bytes(cell["bytes"]) if cell["bytes"] else Path(cell["path"]).read_bytes()

        return read

    return tuple(
        Sample(f"{spec} row {row}", str(prompt), reader(row)) for row, prompt in enumerate(raw[column])
    )  # fmt: skip
