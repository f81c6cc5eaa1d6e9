"""What `recording.json` says. Its files lie below the recording, by their digests; it may come from a stranger."""

from __future__ import annotations

from typing import Annotated, NotRequired, TypedDict

from msgspec import Meta

File = Annotated[str, Meta(pattern=r"^tensors/[0-9a-f]{64}\.npy$")]


class RecordingIndex(TypedDict):
    format: int
    shapes: dict[str, int]
    steps: int
    seed: int
    prompt: str
    guidance_scale: float
    seconds: dict[str, float]
    kinds: dict[str, str]
    calls: dict[str, list[dict[str, dict[str, File]]]]
    rendered: dict[str, File]
    below: NotRequired[dict[str, str]]
    estimates: NotRequired[dict[str, float]]
    fingerprint: NotRequired[str]
