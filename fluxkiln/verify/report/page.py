"""What a page carries of its report, and how pages and the command line write numbers and names."""

from __future__ import annotations

import base64
import gzip
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# rows in the page itself; a script shows the others from the embedded document
MOST_STATIC_ROWS = 1200
# bytes of a document that is embedded as it is; a larger one is compressed
MOST_PLAIN_BYTES = 700_000
# in the page already
_PICTURES = ("reference", "actual", "difference")


def encode_picture(picture: Any, kind: str, most: float = math.inf, **options: Any) -> str:
    """A PIL picture as a data URI of this kind; empty where it takes more than `most` bytes."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}" if buffer.tell() <= most else ""


@dataclass(frozen=True, slots=True)
class Embedded:
    """The text of a script element: JSON, or base64 of gzip of JSON."""

    text: str
    packed: bool


def compact_json(value: Any) -> str:
    """JSON without spaces; NaN and infinity, which it has no number for, become strings."""
    return json.dumps(_json_safe(value), sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def embed_document(document: Mapping[str, Any], most_plain: int | None = None) -> Embedded:
    """The document without its pictures, in a form no HTML parser can mistake for markup.

    Args:
        most_plain: bytes up to which it is embedded as it is; MOST_PLAIN_BYTES by default.
    """
    kept = {key: value for key, value in document.items() if key != "images"}
    for name in ("runs", "judged"):
        if kept.get(name):
            entries = kept[name]["entries"]
            bare = [{key: value for key, value in entry.items() if key not in _PICTURES} for entry in entries]
            kept[name] = {**kept[name], "entries": bare}
    text = compact_json(kept)
    data = text.encode()
    if len(data) > (MOST_PLAIN_BYTES if most_plain is None else most_plain):
        return Embedded(base64.b64encode(gzip.compress(data, 6, mtime=0)).decode(), True)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Embedded(text, False)


def static_rows(rows: Sequence[Mapping[str, Any]], most: int = MOST_STATIC_ROWS) -> list[Mapping[str, Any]]:
    """The rows that stand in the page without a script: all, or those that took most of their allowance, in order."""
    if len(rows) <= most:
        return list(rows)

    def severity(row: Mapping[str, Any]) -> float:
        used = (float(v["excess"]) for v in row["verdicts"] if v["metric"] != "finite")
        return max(used, default=0.0) if row["passed"] else math.inf

    worst = sorted(range(len(rows)), key=lambda index: (-severity(rows[index]), index))[:most]
    return [rows[index] for index in sorted(worst)]


def _json_safe(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _json_safe(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_json_safe(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


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
