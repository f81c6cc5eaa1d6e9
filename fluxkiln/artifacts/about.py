"""What a parity is about, for all who show it: whose weights, what ran, which size, and what that does not show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# the first words of the licences that `fluxkiln synth` and `fluxkiln train recipe` write
RANDOM = b"This is a synthetic checkpoint, written by `fluxkiln synth`"
DRAWN = b"This is a trained synthetic checkpoint, made by `fluxkiln train recipe`"
_NAMES = ("weights", "ran", "size", "speed")


def describe_weights(licence: bytes, source: str) -> str:
    """Whose weights they are, by the licence of the checkpoint called `source`, and what their pictures do not show."""
    if licence.startswith(RANDOM):
        return "random (synthetic): how near two pictures are says nothing of trained weights"
    if licence.startswith(DRAWN):
        return "trained on drawn scenes, a small synthetic model: nothing is shown of FLUX.1's own pictures"
    return f"of the checkpoint {source}"


def read_about(parity: Mapping[str, Any]) -> dict[str, str]:
    """What a build or a manifest, which may be anybody's, says its parity is about: name -> sentence, in order."""
    found = parity.get("about")
    known = found if isinstance(found, Mapping) else {}
    return {name: known[name] for name in _NAMES if isinstance(known.get(name), str)}
