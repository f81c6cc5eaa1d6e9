"""How well a colour can be read on another: the contrast of the Web Content Accessibility Guidelines."""

from __future__ import annotations

import re

# what text of ordinary size needs at level AA
LEGIBLE = 4.5


def brightness(colour: str) -> float:
    """Relative luminance, 0 to 1, of `#rgb`, `#rrggbb` or `rgb(r, g, b)`."""
    if colour.startswith("#"):
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        parts = [int(digits[start : start + 2], 16) / 255 for start in (0, 2, 4)]
    else:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """1 for the same colour to 21 for black on white."""
    high, low = sorted((brightness(one), brightness(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def variables(css: str) -> dict[str, dict[str, str]]:
    """The colours that a style sheet names: {"light": {"ink": "#1b1f24", ...}, "dark": the same with its changes}."""
    light, dark = re.findall(r":root \{(.*?)\}", css, re.DOTALL)[:2]
    named = [dict(re.findall(r"--([\w-]+): (#\w+);", block)) for block in (light, dark)]
    return {"light": named[0], "dark": {**named[0], **named[1]}}
