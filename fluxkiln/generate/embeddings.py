"""Prompts as the text encoders made them, in a file: so that a device needs room for the transformer alone.

A safetensors file: of each prompt its tensors, `0.prompt_embeds` say, float32. Its metadata say which prompts these are
and what encoded them: numbers of other encoders mean something else, and are refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fluxkiln import __version__
from fluxkiln.compile.bundle import Bundle
from fluxkiln.documents import SMALL, read_object
from fluxkiln.errors import CheckpointError, UsageError
from fluxkiln.files import write_durably
from fluxkiln.generate.painter import Encoded, Texts

_FORMAT = "fluxkiln.embeddings/1"
_KEY = "embeddings"
_REMEDY = "write one with generate --save-embeddings"


@dataclass(frozen=True, slots=True)
class Embeddings:
    """What a file has. `encoders`: see `Bundle.encoders`."""

    file: Path
    encoders: str
    prompts: Mapping[Texts, Encoded]

    def check(self, bundle: Bundle) -> None:
        """Raise UsageError unless they are of the encoders of `bundle`, where it is known which these are."""
        check_encoders(bundle, self.encoders, f"--embeddings {self.file}")


def check_encoders(bundle: Bundle, encoders: str, what: str) -> None:
    """Raise UsageError where `what` is of other text encoders than those of `bundle`."""
    if bundle.encoders and encoders != bundle.encoders:
        raise UsageError(
            f"{what}: its text encoders are {encoders[:19] or 'not known'}, those of {bundle.folder} are "
            f"{bundle.encoders[:19]}; encode the prompts with a bundle of the same checkpoint"
        )


def save_embeddings(file: Path, encoders: str, prompts: Mapping[Texts, Encoded]) -> None:
    """Write what text encoders made of prompts."""
    import numpy as np
    from safetensors.numpy import save

    tensors = {
        f"{number}.{name}": np.ascontiguousarray(array, np.float32)
        for number, one in enumerate(prompts.values())
        for name, array in one.embeds.items()
    }
    told = {"format": _FORMAT, "fluxkiln": __version__, "encoders": encoders, "prompts": list(prompts)}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_durably(file, save(tensors, {_KEY: json.dumps(told)}))


def read_embeddings(file: Path) -> Embeddings:
    """What `save_embeddings` wrote; UsageError for anything else, for what is damaged, and for no finite numbers."""
    import numpy as np
    from safetensors import SafetensorError, safe_open

    from fluxkiln.export.checkpoint import read_tensor
    from fluxkiln.export.safetensors_header import read_header

    try:
        refs = read_header(file)
        with safe_open(str(file), framework="np") as stream:
            text = (stream.metadata() or {}).get(_KEY, "{}")
        told = read_object(text.encode(), f"the metadata of {file}", error=UsageError, remedy=_REMEDY, limits=SMALL)
        if told.get("format") != _FORMAT:
            raise UsageError(f"--embeddings {file} has no embeddings of prompts; {_REMEDY}")
        made: dict[Texts, Encoded] = {}
        for number, (prompt, second, padded) in enumerate(told["prompts"]):
            own = {name.partition(".")[2]: ref for name, ref in refs.items() if name.startswith(f"{number}.")}
            embeds = {name: read_tensor(ref) for name, ref in own.items()}
            if not embeds or any(one.dtype != np.float32 or not np.isfinite(one).all() for one in embeds.values()):
                raise UsageError(f"--embeddings {file}: prompt {number} has no numbers, or none in float32; {_REMEDY}")
            made[str(prompt), None if second is None else str(second), bool(padded)] = Encoded(embeds)
        return Embeddings(file, str(told["encoders"]), made)
    except (CheckpointError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"--embeddings {file}: {error}; {_REMEDY}") from error
