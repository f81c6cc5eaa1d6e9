"""Jobs of the local page: one image at a time, the others wait; every step is told as it happens."""

from __future__ import annotations

import base64
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fluxkiln.compile.bundle import Bundle
from fluxkiln.errors import FluxkilnError, ResourceError, UsageError
from fluxkiln.generate.painter import (
    Painter,
    Request,
    Step,
    check_request,
    choose_size,
    default_steps,
    describe_picture,
    paint,
    png_bytes,
)
from fluxkiln.patches.pipeline import GUIDANCE_SCALE
from fluxkiln.settings import parse_size
from fluxkiln.types import Shapes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fluxkiln.verify.reference import Recording

MOST_WAITING, KEPT_JOBS = 8, 32
MOST_PROMPT, MOST_STEPS, MOST_GUIDANCE, MOST_TOKENS = 4000, 1000, 100, 10_000  # characters; denoising steps
ENDED = ("done", "failed", "cancelled")


class CancelledError(Exception):
    """A job was cancelled while it ran; not an error."""


@dataclass(slots=True)
class ImageJob:
    """An image that was asked for. `events` only grows; the last one has a state of `ENDED`.

    Who has its id has the image: nobody can guess it, and no one but who asked is told.
    """

    id: str
    request: Request
    events: list[dict[str, Any]] = field(default_factory=list)
    png: bytes = b""
    cancelled: bool = False

    @property
    def state(self) -> str:
        return str(self.events[-1]["state"]) if self.events else "waiting"

    @property
    def ended(self) -> bool:
        return self.state in ENDED


class Studio:
    """Makes images in one thread, in the order they were asked for.

    Args:
        open_painter: size of the bundle -> its painter. One is open at a time; the first size's at once.
        reference: the recorded run of the bundle's build, to compare with; None where there is none.
        most_waiting: jobs in the queue besides the one that runs.
    """

    def __init__(
        self, bundle: Bundle, open_painter: Callable[[Shapes], Painter], reference: Recording | None = None,
        most_waiting: int = MOST_WAITING,
    ) -> None:  # fmt: skip
        self.bundle, self._open_painter = bundle, open_painter
        self.painter = open_painter(bundle.shapes)
        self.reference, self.most_waiting = reference, most_waiting
        self._jobs: dict[str, ImageJob] = {}
        self._waiting: list[ImageJob] = []
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="studio")

    def submit(self, request: Request) -> ImageJob:
        """Put an image into the queue. Errors as `check_request`; ResourceError: too many are waiting."""
        check_request(self.bundle, request)
        with self._lock:
            if len(self._waiting) >= self.most_waiting:
                raise ResourceError(
                    f"{len(self._waiting)} images are waiting already, {self.most_waiting} at most may; try again "
                    "when one is finished"
                )
            job = ImageJob(secrets.token_urlsafe(24), request)
            self._jobs[job.id] = job
            for old in [one for one in self._jobs.values() if one.ended][: max(0, len(self._jobs) - KEPT_JOBS)]:
                del self._jobs[old.id]
            self._waiting.append(job)
            self._show_places()
            self._pool.submit(self._work, job)
        return job

    def find(self, job: str) -> ImageJob | None:
        """The job with an id, if it is still known."""
        with self._lock:
            return self._jobs.get(job)

    def cancel(self, job: ImageJob) -> None:
        """Take a job out of the queue, or stop it after its current step."""
        with self._lock:
            job.cancelled = True
            if job in self._waiting:
                job.events.append({"state": "cancelled"})
                self._waiting.remove(job)
                self._show_places()

    def close(self) -> None:
        """Stop after the current step; what waits is cancelled."""
        with self._lock:
            for job in self._jobs.values():
                job.cancelled = True
            for job in self._waiting:
                job.events.append({"state": "cancelled"})
            self._waiting.clear()
        self._pool.shutdown()
        self.painter.close()

    def __enter__(self) -> Studio:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _show_places(self) -> None:
        busy = sum(job.state in ("encoding", "denoising", "decoding") for job in self._jobs.values())
        for place, job in enumerate(self._waiting):
            job.events.append({"state": "waiting", "ahead": place + busy})

    def _work(self, job: ImageJob) -> None:
        with self._lock:
            if job not in self._waiting:
                return
            self._waiting.remove(job)
            job.events.append({"state": "encoding"})
            self._show_places()
        job.events.append(self._make(job))

    def _make(self, job: ImageJob) -> dict[str, Any]:
        """Run a job; its last event."""
        began, shapes = time.perf_counter(), choose_size(self.bundle, job.request.size, job.request.tokens)
        show = Preview(shapes)

        def on_step(_: int, step: Step) -> None:
            if job.cancelled:
                raise CancelledError
            job.events.append(
                {
                    "state": "denoising",
                    "step": step.index,
                    "steps": step.steps,
                    "seconds": round(step.seconds, 3),
                    "preview": base64.b64encode(show(step.latents)).decode(),
                }
            )

        try:
            if shapes != self.painter.bundle.shapes:
                self.painter.close()
                self.painter = self._open_painter(shapes)
            (picture,) = paint(self.painter, [job.request], on_step=on_step)
        except CancelledError:
            return {"state": "cancelled"}
        except FluxkilnError as error:
            return {"state": "failed", "error": str(error)}
        except Exception as error:  # the page gets a sentence, and the next job its turn
            return {"state": "failed", "error": f"a bug in fluxkiln: {type(error).__name__}: {error}; please report it"}
        job.png = png_bytes(picture.image, describe_picture(self.bundle, self.painter.executor.name, job.request))
        return {
            "state": "done",
            "seconds": round(time.perf_counter() - began, 2),
            "notes": list(picture.notes),
            "comparison": self._compare(job.request, picture.image),
        }

    def _compare(self, request: Request, image: NDArray[Any]) -> dict[str, Any] | None:
        """How near an image is to the reference's, if it was made from the same prompt, seed and settings."""
        reference = self.reference
        if reference is None or not is_reference(self.bundle, request, reference):
            return None
        import numpy as np

        from fluxkiln.verify.metrics import compare_images, gain_of

        wanted = (reference.image * 255).round().astype(np.uint8)
        found = compare_images(image, wanted)
        return {
            "psnr": None if found.psnr is None or not np.isfinite(found.psnr) else round(float(found.psnr), 2),
            "ssim": None if found.ssim is None else round(float(found.ssim), 4),
            "identical": bool(found.max_abs == 0),
            "gain": gain_of(np.abs(image.astype(np.int16) - wanted)),
        }


class Preview:
    """Latents as a small picture: their three strongest directions as colours, kept from step to step."""

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = shapes
        self._basis: NDArray[Any] | None = None

    def __call__(self, latents: NDArray[Any]) -> bytes:
        """A PNG of half the latents' sides from packed latents [1, S, 4C]."""
        import numpy as np

        rows, columns = self.shapes.height // 16, self.shapes.width // 16
        pixels = latents[0].reshape(rows * columns, -1, 4).mean(axis=2)  # [S, C]
        centred = pixels - pixels.mean(axis=0)
        _, vectors = np.linalg.eigh(centred.T @ centred)
        basis = vectors[:, -3:]
        if self._basis is not None:
            basis = basis * np.where((basis * self._basis).sum(axis=0) < 0, -1.0, 1.0)
        self._basis = basis
        colours = centred @ basis
        spread = np.abs(colours).max(axis=0).clip(1e-6)
        image = (127.5 + 127.5 * colours / spread).round().astype(np.uint8).reshape(rows, columns, 3)
        return png_bytes(image, {})


def parse_request(bundle: Bundle, document: Any) -> Request:
    """A request from the page's JSON; UsageError: no object, an unknown key, a value of another type or range.
    ShapeError: no size."""
    if not isinstance(document, Mapping):
        raise UsageError('the request is no JSON object; send {"prompt": ...}')

    def is_whole(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    def is_short(value: Any) -> bool:
        return isinstance(value, str) and len(value.strip()) <= MOST_PROMPT

    known: Mapping[str, tuple[Callable[[Any], bool], str]] = {
        "prompt": (lambda it: is_short(it) and bool(it.strip()), f"a text of 1 to {MOST_PROMPT} characters"),
        "prompt_2": (lambda it: it is None or is_short(it), f"a text of at most {MOST_PROMPT} characters"),
        "seed": (is_whole, "a whole number"),
        "steps": (lambda it: it is None or (is_whole(it) and it <= MOST_STEPS), f"a whole number up to {MOST_STEPS}"),
        "guidance": (
            lambda it: it is None or ((isinstance(it, float) or is_whole(it)) and abs(it) <= MOST_GUIDANCE),
            f"a number up to {MOST_GUIDANCE}",
        ),
        "size": (lambda it: it is None or is_short(it), "a text, WIDTHxHEIGHT"),
        "tokens": (lambda it: it is None or (is_whole(it) and 0 < it <= MOST_TOKENS), f"1 to {MOST_TOKENS}"),
    }
    if unknown := sorted(set(document) - set(known)):
        raise UsageError(f"the request has the unknown key {unknown[0]!r}; it may have {', '.join(known)}")
    if "prompt" not in document:
        raise UsageError("the request has no prompt; type one")
    for name, value in document.items():
        is_legal, rule = known[name]
        if not is_legal(value):
            raise UsageError(f"{name.replace('_', ' ')}: it must be {rule}")
    guidance = document.get("guidance")
    return Request(
        document["prompt"].strip(),
        document.get("seed", 0),
        (document.get("prompt_2") or "").strip() or None,
        document.get("steps"),
        None if guidance is None else float(guidance),
        None if document.get("size") is None else parse_size(document["size"]),
        document.get("tokens"),
    )


def find_reference(bundle: Bundle) -> Recording | None:
    """The reference run recorded beside the bundle by its build, if it is of the bundle's size and whole."""
    from fluxkiln.verify.reference import read_recording

    folder = bundle.folder.parent / "recording"
    if not (folder / "recording.json").is_file():
        return None
    try:
        recording = read_recording(folder)
        usable = recording.shapes == bundle.manifest.shapes and bool(recording.image.size)
    except (FluxkilnError, OSError, KeyError, ValueError):
        return None
    return recording if usable else None


def is_reference(bundle: Bundle, request: Request, reference: Recording) -> bool:
    """Whether a request asks for just what the reference run made."""
    guidance = GUIDANCE_SCALE if request.guidance is None else request.guidance
    return (
        choose_size(bundle, request.size, request.tokens) == reference.shapes
        and request.prompt == reference.prompt
        and request.prompt_2 in (None, reference.prompt)
        and request.seed == reference.seed
        and (request.steps or default_steps(bundle)) == reference.steps
        and (not bundle.takes_guidance or guidance == reference.guidance_scale)
    )
