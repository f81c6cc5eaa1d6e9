"""The file of a calibration: statistics of the inputs of many weight matrices, as safetensors.

For every input that several matrices may share (the query, key and value of an attention say) there are a tensor
`<key>.peaks` [I] and either `<key>.blocks` [n, b, b] or, where b does not divide I, `<key>.blocks` and `<key>.rest`
[r, r]. The metadata entry `calibration` is JSON: which checkpoint, which prompts, and per matrix its key and count.

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fluxkiln.errors import IntegrityError, SchemeError
from fluxkiln.quantize.statistics import Statistics

FORMAT = 1
METADATA = "calibration"
# channels of a block, half of FLUX.1's width: 9 MB. Whole inputs are twice as many bytes for a tenth less error
DEFAULT_BLOCK = 1536


@dataclass(frozen=True, slots=True)
class Calibration:
    """An open calibration; statistics are read one matrix at a time.

    Attributes:
        digest: of the file.
        components: component -> digest of its weights.
        matrices: component -> tensor name of the checkpoint -> key of its input, and how many rows of it were seen.
        facts: prompts, steps, shapes: what a report says of it.
        data: sha256 of its statistics, as it was when they were recorded.
    """

    path: Path
    digest: str
    components: Mapping[str, str]
    matrices: Mapping[str, Mapping[str, tuple[str, int]]]
    facts: Mapping[str, Any] = field(default_factory=dict)
    data: str = ""

    def check_data(self) -> None:
        """Raise IntegrityError unless all statistics are those that were recorded, each in its place."""
        with self.path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
        if digest_data(self.path, start) != self.data:
            raise IntegrityError(
                f"the statistics in {self.path} are not the ones that were recorded; fetch the file again, or run "
                "fluxkiln calibrate"
            )

    def check_checkpoint(self, component: str, digest: str) -> None:
        """Raise SchemeError unless it was made with this component's weights."""
        found = self.components.get(component)
        if found != digest:
            what = f"weights {found[:19]}" if found else "no weights"
            raise SchemeError(
                f"calibration {self.path.name} was made with {what} of {component}, this checkpoint's are "
                f"{digest[:19]}; run fluxkiln calibrate on this checkpoint"
            )

    def statistics(self, component: str, tensor: str, in_features: int) -> Statistics:
        """Of the inputs of one matrix of the checkpoint.

        Raises:
            SchemeError: it has none, they are for another width, or not finite.
            IntegrityError: the file is damaged.
        """
        import numpy as np
        from safetensors import SafetensorError, safe_open

        try:
            key, count = self.matrices[component][tensor]
        except KeyError:
            raise SchemeError(
                f"calibration {self.path.name} says nothing of {tensor} of {component}; run fluxkiln calibrate again"
            ) from None
        try:
            with safe_open(self.path, framework="np") as file:
                names = file.keys()
                blocks = [np.asarray(block) for block in file.get_tensor(f"{key}.blocks")]
                if f"{key}.rest" in names:
                    blocks.append(file.get_tensor(f"{key}.rest"))
                found = Statistics(tuple(blocks), file.get_tensor(f"{key}.peaks"), count)
        except (SafetensorError, OSError) as error:
            raise IntegrityError(f"{self.path} cannot be read ({error}); run fluxkiln calibrate again") from error
        found.check(tensor, in_features)
        return found


def digest_data(path: Path, start: int) -> str:
    """sha256 of a file from a byte on."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def open_calibration(path: Path, digest: str) -> Calibration:
    """Read what a calibration is of; its statistics are read later.

    Raises:
        IntegrityError: it is no calibration, or cut short.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            known = json.loads((file.metadata() or {})[METADATA])
            names = set(file.keys())
        if known["format"] != FORMAT:
            raise IntegrityError(f"{path} has format {known['format']}, this is {FORMAT}; run fluxkiln calibrate again")
        matrices = {
            component: {name: (str(key), int(count)) for name, (key, count) in entries.items()}
            for component, entries in known["matrices"].items()
        }
        keys = {key for entries in matrices.values() for key, _ in entries.values()}
        if missing := [key for key in sorted(keys) if not {f"{key}.peaks", f"{key}.blocks"} <= names]:
            raise IntegrityError(f"{path} has no statistics of {missing[0]}; run fluxkiln calibrate again")
        return Calibration(path, digest, known["components"], matrices, known["facts"], known["data"])
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{path} is no calibration ({error}); run fluxkiln calibrate to make one") from error
