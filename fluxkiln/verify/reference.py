"""One run of the unmodified diffusers pipeline, recorded: what every part was given and what it made of it.

A recording is a folder: `tensors/<sha256>.npy`, so that an output which is the next part's input is stored once, and
`recording.json`, written last, which says what is what.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.documents import read_object_file
from fluxkiln.errors import IntegrityError, PatchError, ResourceError, UsageError
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.files import write_durably
from fluxkiln.patches.model import Call, Model
from fluxkiln.patches.pipeline import Sampling, quiet
from fluxkiln.types import Part, Shapes

if TYPE_CHECKING:
    from numpy.typing import NDArray


_FORMAT = 1
INDEX = "recording.json"
RENDERED = ("latents", "image", "prompt_embeds", "pooled_prompt_embeds")


@dataclass(frozen=True, slots=True)
class Recording:
    """A recorded reference run. Arrays are read when asked for; float32, token ids int64.

    `calls` has one entry for each time a part ran: `steps` of them for the transformer, one for the rest. In one that
    travels with a bundle, `below` has the rung at which each part's `below` outputs were made, and `estimates` the
    compiler's of a run, in milliseconds; `fingerprint` is the checkpoint's.
    """

    root: Path
    shapes: Shapes
    steps: int
    seed: int
    prompt: str
    guidance_scale: float
    seconds: Mapping[str, float]
    kinds: Mapping[str, str]
    calls: Mapping[str, tuple[Call, ...]]
    rendered: Mapping[str, str]
    below: Mapping[str, str] = field(default_factory=dict)
    estimates: Mapping[str, float] = field(default_factory=dict)
    fingerprint: str = ""

    def inputs(self, part: str, step: int = 0) -> dict[str, NDArray[Any]]:
        """What `part` was given in `step`, by its kind's input names; guidance only where the model takes it."""
        return self._read_all(part, step, "inputs")

    def outputs(self, part: str, step: int = 0) -> dict[str, NDArray[Any]]:
        """What `part` made of it, by its kind's output names."""
        return self._read_all(part, step, "outputs")

    def made_below(self, part: str, step: int = 0) -> dict[str, NDArray[Any]]:
        """What `part` made of its inputs at the rung `below`."""
        return self._read_all(part, step, "below")

    @property
    def latents(self) -> NDArray[Any]:
        """Packed latents after the last step, [1, S, 4C]; like all that was rendered, empty where nothing made it."""
        return self.rendering("latents")

    @property
    def image(self) -> NDArray[Any]:
        """The image, [height, width, 3] in 0..1."""
        return self.rendering("image")

    def rendering(self, name: str) -> NDArray[Any]:
        """One of RENDERED: also T5's output as the pipeline used it, [1, T, joint], and CLIP's pooled, [1, pooled]."""
        return self._read(self.rendered[name])

    def _read_all(self, part: str, step: int, side: str) -> dict[str, NDArray[Any]]:
        if part not in self.calls:
            raise UsageError(f"no part called {part!r} was recorded; there are {', '.join(self.calls)}")
        if not 0 <= step < len(self.calls[part]):
            raise UsageError(f"step {step} of {part} was not recorded; it ran {len(self.calls[part])} times")
        return {name: self._read(file) for name, file in self.calls[part][step][side].items()}

    def _read(self, file: str) -> NDArray[Any]:
        import numpy as np

        try:
            array: NDArray[Any] = np.load(self.root / file, allow_pickle=False)
        except (OSError, ValueError, EOFError, MemoryError) as error:
            raise IntegrityError(f"{self.root / file} cannot be read ({error}); record the reference again") from error
        return array


def record_reference(
    checkpoint: Checkpoint,
    parts: tuple[Part, ...],
    shapes: Shapes,
    destination: Path,
    sampling: Sampling | None = None,
    *,
    only: bool = False,
) -> Recording:
    """Run diffusers' pipeline as published, in float32, and keep what goes in and out of every part.

    Weights are in memory one block at a time (`fluxkiln.verify.pipeline`), and are read anew at every step. Arrays are
    written as they appear, none is kept.

    Args:
        parts: the parts to record. Which components run is seen from them, and which VAE: the checkpoint's own, or
            `vae_tiny`. What a component that does not run would have made is random numbers for the seed.
        destination: a folder, made if it is not there; an older recording in it is replaced.
        only: leave out all blocks that are not among `parts`.

    Raises:
        CheckpointError: the tiny VAE is asked for and not there, or a tensor is missing or damaged.
        ResourceError: the disk is full.
        PatchError: a part was not called, or not in the way this was written for; diffusers changed.
    """
    start, model, sampling = time.perf_counter(), checkpoint.model, sampling or Sampling()
    # No recording.json while the folder fills.
    if (destination / INDEX).exists():
        (destination / INDEX).unlink()
        shutil.rmtree(destination / "tensors", ignore_errors=True)
    (destination / "tensors").mkdir(parents=True, exist_ok=True)
    with quiet():
        from fluxkiln.verify.pipeline import open_pipeline, shorten, weights_in_place

        pipe = open_pipeline(checkpoint, {part.component: part.folder for part in parts})
    recorder = _Recorder(destination)
    for part in parts:
        model.observe(pipe, part, recorder.put)
    if only:
        shorten(pipe, model, {part.prefix for part in parts})
    loaded = time.perf_counter()
    with weights_in_place():
        made = model.render(pipe, shapes, sampling)
    for part in parts:
        expected = sampling.steps if part.component == "transformer" else 1
        if (count := len(recorder.calls.get(part.name, ()))) != expected:
            raise PatchError(
                f"part {part.name} ran {count} times in the reference, {expected} "
                "were expected; install the versions pinned in constraints.txt"
            )
    index = {
        "format": _FORMAT,
        "shapes": asdict(shapes),
        **asdict(sampling),
        "seconds": {"load": loaded - start, "run": made.seconds},
        "kinds": {part.name: part.kind for part in parts},
        "calls": {part.name: recorder.calls[part.name] for part in parts},
        "rendered": {name: store_array(destination, getattr(made, name)) for name in RENDERED},
    }
    write_durably(destination / INDEX, json.dumps(index, indent=1).encode() + b"\n")
    return read_recording(destination)


def view_recording(recording: Recording, model: Model, parts: tuple[Part, ...]) -> Recording:
    """A recording of `Model.recorded_parts` as if only `parts`, of one form or some of it, had been recorded.

    Raises UsageError: a part was not recorded, or not in a form it can be made of.
    """
    return replace(
        recording,
        kinds={part.name: part.kind for part in parts},
        calls={part.name: model.recorded_calls(recording, part) for part in parts},
    )


def read_recording(path: Path) -> Recording:
    """Open the recording in the folder `path`. IntegrityError: there is none, or it was not finished."""
    from fluxkiln.verify.recording_schema import RecordingIndex

    try:
        index = read_object_file(path / INDEX, RecordingIndex, remedy="record the reference again")
        if index["format"] != _FORMAT:
            raise IntegrityError(f"{path / INDEX} has format {index['format']}, this is {_FORMAT}; record it again")
        return Recording(
            root=path,
            shapes=Shapes(**index["shapes"]),
            calls={part: tuple(calls) for part, calls in index["calls"].items()},
            rendered=index["rendered"],
            below=index.get("below", {}),
            estimates=index.get("estimates", {}),
            fingerprint=index.get("fingerprint", ""),
            **{name: index[name] for name in ("steps", "seed", "prompt", "guidance_scale", "seconds", "kinds")},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{path} holds no finished recording ({error}); record the reference again") from error


@dataclass(slots=True)
class _Recorder:
    root: Path
    calls: dict[str, list[Call]] = field(default_factory=dict)

    def put(self, part: Part, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        kind = part.traits
        if not inputs.keys() <= set(kind.inputs) or outputs.keys() != set(kind.outputs):
            raise PatchError(
                f"kind {part.kind} was recorded with {', '.join([*inputs, *outputs])}; it is declared with "
                f"{', '.join([*kind.inputs, *kind.outputs])}"
            )
        files = {
            "inputs": {name: store_array(self.root, inputs[name]) for name in kind.inputs if name in inputs},
            "outputs": {name: store_array(self.root, outputs[name]) for name in kind.outputs},
        }
        self.calls.setdefault(part.name, []).append(files)


def store_array(root: Path, tensor: Any) -> str:
    """Write a tensor or array under its digest; returns the file's path below the folder."""
    import numpy as np

    array = np.ascontiguousarray(tensor if isinstance(tensor, np.ndarray) else tensor.detach().cpu().numpy())
    if array.dtype != np.int64:
        array = array.astype(np.float32, copy=False)
    digest = hashlib.sha256(f"{array.dtype.str} {array.shape}\n".encode())
    digest.update(array.reshape(-1).view("u1").data)
    file = f"tensors/{digest.hexdigest()}.npy"
    path = root / file
    if path.exists():
        return file
    unfinished = path.with_suffix(".partial")
    try:
        with unfinished.open("wb") as stream:
            np.save(stream, array, allow_pickle=False)
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise ResourceError(
            f"{path} cannot be written: {error.strerror}; a recording holds every part's inputs and outputs in "
            "float32: free some space or choose another folder"
        ) from error
    return file
