"""How pages and the command line write numbers and names; `report.js.j2` has the same rules for the rows it adds."""

from __future__ import annotations

import math
from typing import Any


def number(value: Any) -> str:
    """Three significant digits: 2.4e-3, 0.25, 36.1, 0, NaN, ∞."""
    found = float(value)
    if not math.isfinite(found):
        return "NaN" if math.isnan(found) else "∞"
    if found == 0.0 or 0.1 <= abs(found) < 1000.0:
        return f"{found:.3g}"
    mantissa, _, exponent = f"{found:.2e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def bound(value: Any) -> str:
    """A gate's bound as its author wrote it: 1e-6, 0.006, 18."""
    return f"{float(value):g}".replace("e-0", "e-")


def cosine(value: Any) -> str:
    """Six decimals: what matters of a number close to 1 stands far behind the point."""
    found = float(value)
    return f"{found:.6f}" if math.isfinite(found) else "NaN"


def size(count: Any) -> str:
    """Bytes: 940 B, 23.4 kB, 97 MB, 6.48 GB."""
    found = float(count)
    for unit in ("B", "kB", "MB"):
        if found < 999.5:  # three digits of what is above are those of the next unit
            return f"{found:.3g} {unit}"
        found /= 1000.0
    return f"{found:.2f} GB"


def seconds(value: Any) -> str:
    """75 ms, 8.5 s, 24 s, 5.7 min."""
    found = float(value)
    if found < 0.1:
        return f"{1000.0 * found:.2g} ms"
    return f"{found:.2g} s" if found < 10.0 else f"{found:.0f} s" if found < 120.0 else f"{found / 60.0:.1f} min"


def word(name: str) -> str:
    """A name of the data as one reads it: hidden states out, relative L2, PSNR."""
    if name in ("psnr", "ssim"):
        return name.upper()
    words = name.replace("_", " ")
    return words.removesuffix(" l2") + " L2" if words.endswith(" l2") else words


FILTERS = {"number": number, "bound": bound, "cosine": cosine, "size": size, "seconds": seconds, "word": word}
