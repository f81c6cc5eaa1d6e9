"""Under which terms a bundle may be published, and whether its publisher has been told.

FLUX.1-dev's licence asks everybody who passes on the model or a derivative of it to hand over the licence with it.
Source: FLUX.1 [dev] Non-Commercial License, section 3 (distribution); FLUX.1-schnell is under Apache-2.0.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from fluxkiln.artifacts.manifest import Manifest
from fluxkiln.errors import UsageError

FLUX_DEV = "flux-1-dev"
NON_COMMERCIAL = "LicenseRef-FLUX-1-dev-Non-Commercial"
ACCEPTABLE = (FLUX_DEV,)

# The first words of the licence of checkpoints that `fluxkiln synth` writes: random numbers, derived from nothing.
_SYNTHETIC = b"This is a synthetic checkpoint, written by `fluxkiln synth`"
_TITLE = re.compile(rb"flux[\s.\d]*\[?dev\]?\s+non-commercial\s+license", re.IGNORECASE)
# Of the text itself, which is far longer; a title or a note is no licence.
_LEAST_BYTES = 1000


def is_synthetic(licence: bytes) -> bool:
    """Whether the weights are random numbers of ours, by the licence that travels with them."""
    return licence.startswith(_SYNTHETIC)


def is_from_dev(manifest: Manifest, licence: bytes) -> bool:
    """Whether a bundle is derived from FLUX.1-dev, and so under its terms."""
    return (manifest.variant == "dev" or manifest.licence.spdx == NON_COMMERCIAL) and not is_synthetic(licence)


def check_licence(manifest: Manifest, licence: bytes, accepted: Collection[str]) -> None:
    """Refuse to publish what may not be passed on like this.

    Args:
        licence: the text in the bundle.
        accepted: names of licences that the publisher has accepted, of `ACCEPTABLE`.

    Raises:
        UsageError: derived from FLUX.1-dev, and its licence text is missing or was not accepted; or an unknown name.
    """
    for name in accepted:
        if name not in ACCEPTABLE:
            raise UsageError(f"no licence is called {name!r}; there is {', '.join(ACCEPTABLE)} to accept")
    if not is_from_dev(manifest, licence):
        return
    if len(licence) < _LEAST_BYTES or not _TITLE.search(licence):
        raise UsageError(
            f"{manifest.name} is derived from FLUX.1-dev, and its {manifest.licence.file} is not the text of the "
            "FLUX.1 [dev] Non-Commercial License, which must go with it; put LICENSE.md of the model's page into the "
            "checkpoint's folder and build the bundle again"
        )
    if FLUX_DEV not in accepted:
        raise UsageError(
            f"{manifest.name} is derived from FLUX.1-dev: who passes it on is bound by the FLUX.1 [dev] Non-Commercial "
            f"License. Read the bundle's {manifest.licence.file}; if you may and will, add --accept-license {FLUX_DEV}"
        )
