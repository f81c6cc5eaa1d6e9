"""The parity report: `report.json` for programs, `report.html` for people, both from one dict.

The HTML is a pure function of the dict, so it can be made again from a stored `report.json`. It is one file: no
network, no fonts, no libraries, readable without JavaScript. Keys of the dict, all but the first two optional:
    title, target: strings. reference: what the reference is, in words.
    model: name, fingerprint, variant. shapes: height, width, tokens, steps. schemes: part or kind -> scheme.
    parts: list of name, kind, scheme, bytes, device_memory, estimate_ms, made (`cast`, `compiled`, ...), maybe
    measured_ms.
    images: see `compare_pictures`. timings: list of name, seconds. memory: file -> {what: bytes}.
    devices: budget in bytes, peaks {way to load: bytes on each device}, load (the way that fits).
    heat: maps of `verify.heat`. runs: of `verify.runs`: several prompts and seeds.
    judged: facts of fixed prompts that hold in the pictures, in percent, and how near these are to the reference's.
    estimate, lowering: label, entries {what: value with its unit}, values for programs.
    about: `weights`, `ran`, `size` and maybe `speed`: a sentence on each. loras: what matched, and how much each part
    changes, tools, machine, provenance: what -> text.
`build_report` adds schema, rows, gates, rungs (fields of `gates.Rung`, and whether rows compare it), kinds (component,
name in a comparison, what its blocks are called if it updates a residual stream), summary and verdict.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fluxkiln.errors import UsageError
from fluxkiln.files import write_durably
from fluxkiln.types import Kind
from fluxkiln.verify.gates import GROUP_NAMES, Gate, Row, Rung, first_bad_rung
from fluxkiln.verify.heat import map_picture
from fluxkiln.verify.ladder import Ladder, name_culprit, row_to_dict, verdict_to_dict
from fluxkiln.verify.metrics import AnyArray, gain_of
from fluxkiln.verify.report.charts import (
    Measure,
    depth_chart,
    drift_chart,
    ladder_panels,
    rung_keys,
    rungs_drawn,
    step_chart,
)
from fluxkiln.verify.report.page import FILTERS, compact_json, embed_document, encode_picture, static_rows, word

SCHEMA = "fluxkiln.report/2"
# of `timings`: the recorded run's image, made by parts at its rung
IMAGE_TIME = "image by parts"
SIGNIFICANT_DIGITS = 6
MAX_HTML_BYTES = 3_000_000
FEW_ROWS = 300  # in a page that would be larger
MAX_IMAGE_BYTES = 200_000
FACTS = frozenset(
    {"title", "target", "reference", "model", "shapes", "schemes", "parts", "images", "timings", "memory", "estimate"}
    | {"devices", "lowering", "heat", "runs", "judged", "about", "loras"}
    | {"tools", "machine", "provenance"}
)
MEASURES: tuple[tuple[Measure, str], ...] = (
    ("delta", "what a part adds, against the reference"),
    ("whole", "whole output, against the reference"),
    ("added", "against the rung before"),
)


def build_report(ladder: Ladder, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The report's dict: `facts` (see the module) plus a ladder's rows, gates, a summary and the verdict in words.

    Raises UsageError: a fact the report has no place for, or no title or target.
    """
    unknown, missing = set(facts) - FACTS, {"title", "target"} - set(facts)
    if unknown or missing:
        wrong = f"no place for {', '.join(sorted(unknown))}" if unknown else f"{', '.join(sorted(missing))} is missing"
        raise UsageError(f"report facts: {wrong}; a report takes {', '.join(sorted(FACTS))}")
    rows, gates = ladder.rows, ladder.gates
    compared = {row.rung for row in rows}
    return {
        **facts,
        "schema": SCHEMA,
        "rows": [row_to_dict(row, gates) for row in rows],
        "gates": [_gate_to_dict(gate, number, ladder) for number, gate in enumerate(gates)],
        "rungs": [asdict(rung) | {"compared": name in compared} for name, rung in ladder.rungs.items()],
        "kinds": {row.traits.name: _kind_to_dict(row.traits) for row in rows if row.traits},
        "summary": _summarise(rows, gates),
        "verdict": _verdict(rows),
    }


def read_rungs(document: Mapping[str, Any]) -> dict[str, Rung]:
    """The rungs of a report by name."""
    return {one["name"]: Rung(*(one[field] for field in Rung.__dataclass_fields__)) for one in document["rungs"]}


def compare_pictures(reference: AnyArray, actual: AnyArray, rung: str) -> dict[str, Any]:
    """The `images` section: both pictures and their amplified difference as data URIs.

    Args:
        reference, actual: [height, width, 3], both uint8 or both float in 0..1.
        rung: the rung that `actual` was made at.

    Returns:
        reference, actual, difference: data URIs; gain: what the difference was multiplied by (see `gain_of`);
        largest: of the difference, 0 to 255; width, height, rung.
    """
    shown, other = _to_uint8(reference), _to_uint8(actual)
    difference = np.abs(shown.astype(np.int16) - other.astype(np.int16))
    gain = gain_of(difference)
    return {
        "reference": _data_uri(shown),
        "actual": _data_uri(other),
        "difference": _data_uri(np.minimum(difference * gain, 255).astype(np.uint8)),
        "gain": gain,
        "largest": int(difference.max()),
        "width": int(shown.shape[1]),
        "height": int(shown.shape[0]),
        "rung": rung,
    }


def write_report(destination: Path, report: Mapping[str, Any]) -> tuple[Path, Path]:
    """Write `report.json` and `report.html` into the folder `destination`, each replaced in one step.

    The same dict gives the same bytes: keys are sorted, floats keep six significant digits, and floats JSON has no
    number for become the strings NaN, Infinity and -Infinity (as in Protocol Buffers' JSON mapping).

    Returns:
        The two paths.
    """
    document = plain(report)
    html = render_html(document)
    destination.mkdir(parents=True, exist_ok=True)
    paths = destination / "report.json", destination / "report.html"
    for path, text in zip(paths, (_dump(document), html), strict=True):
        write_durably(path, text.encode())
    return paths


def render_html(report: Mapping[str, Any]) -> str:
    """`report.html` from a dict of `build_report`, as built or as read back from `report.json`."""
    from markupsafe import Markup

    document = plain(report)
    rows, rungs = document["rows"], read_rungs(document)
    environment = page_environment()
    stacks: dict[str, dict[str, str]] = {}  # component -> its kinds of blocks, and what these are called
    kind_names = list(dict.fromkeys(row["kind"] for row in rows))
    for kind in kind_names:
        entry = document["kinds"].get(kind)
        if entry and entry["blocks"]:
            stacks.setdefault(entry["component"], {})[kind] = entry["blocks"]
    embedded = embed_document(document)
    context = {
        "report": dict.fromkeys(FACTS) | document,
        "embedded": Markup(embedded.text),
        "packed": embedded.packed,
        "static_rows": static_rows(rows),
        "measures": MEASURES,
        "panels": {
            measure: [(title, Markup(svg)) for title, svg in ladder_panels(rows, measure, rungs)] if rows else []
            for measure, _ in MEASURES
        },
        "depth": [
            (
                f"{word(component).capitalize()} blocks",
                Markup(rung_keys(rungs_drawn(rows, kinds, rungs))),
                [(measure, Markup(depth_chart(rows, kinds, measure, rungs))) for measure in ("added", "delta")],
                [(measure, Markup(step_chart(rows, kinds, measure, rungs))) for measure in ("added", "delta")],
            )
            for component, kinds in stacks.items()
            if len({row["part"] for row in rows if row["kind"] in kinds}) > 1
        ],
        "heat": [{**entry, "picture": map_picture(entry)} for entry in document.get("heat") or ()],
        "drift": Markup(drift_chart(document["runs"]["entries"])) if document.get("runs") else "",
        "rung_order": {name: rung.order for name, rung in rungs.items()},
        "rung_names": [one["name"] for one in document["rungs"] if one["compared"]],
        "kind_names": kind_names,
    }
    template = environment.get_template("report.html.j2")
    html: str = template.render(context)
    if len(html.encode()) > MAX_HTML_BYTES:
        packed = embed_document(document, most_plain=0)
        html = template.render(
            context | {"embedded": Markup(packed.text), "packed": True, "static_rows": static_rows(rows, FEW_ROWS)}
        )
    if len(html.encode()) > MAX_HTML_BYTES:
        html = template.render(context | {"embedded": ""})
    return html


def page_environment(folder: Path | None = None) -> Any:
    """Templates of the pages, of `folder` as well, and how they write numbers."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader([*([folder] if folder else []), Path(__file__).parent / "templates"]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(FILTERS)
    return environment


def plain(value: Any) -> Any:
    """`value` in JSON's own types, floats rounded; NaN and infinity stay floats for now."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        return float(f"{value:.{SIGNIFICANT_DIGITS}g}")
    return value if value is None or isinstance(value, str | int | bool) else str(value)


def _summarise(rows: Sequence[Row], gates: Sequence[Gate]) -> dict[str, Any]:
    rungs = []
    for rung in sorted({row.at for row in rows}, key=lambda rung: rung.order):
        here = [row for row in rows if row.at == rung]
        judged = [(row, row.worst) for row in here if row.worst is not None]
        worst = max(judged, key=lambda pair: (not pair[1].passed, pair[1].excess), default=None) if judged else None
        rungs.append(
            {
                "rung": rung.name,
                "meaning": rung.meaning,
                "rows": len(here),
                "parts": len({row.part for row in here}),
                "failed": sum(not row.passed for row in here),
                "worst": worst
                and {
                    **{name: getattr(worst[0], name) for name in ("part", "output", "step", "scheme")},
                    **verdict_to_dict(worst[1], gates),
                },
            }
        )
    return {
        "rows": len(rows),
        "failed": sum(not row.passed for row in rows),
        "parts": len({row.part for row in rows if row.traits}),
        "pipeline": not all(row.traits for row in rows),
        "rungs": rungs,
        "first_bad": first_bad_rung(rows),
    }


def _verdict(rows: Sequence[Row]) -> dict[str, Any]:
    failure = name_culprit(rows)
    failed = [row for row in rows if not row.passed]
    bad, all_parts = {row.part for row in failed}, {row.part for row in rows}
    if not failure:
        headline = f"All {len(rows)} comparisons stayed within their gates."
    elif not rows:
        headline = "Nothing was compared."
    else:
        headline = f"{len(failed)} of {len(rows)} comparisons missed a gate, in {len(bad)} of {len(all_parts)} parts."
    return {"passed": not failure, "headline": headline, "failure": failure}


def _kind_to_dict(kind: Kind) -> dict[str, str]:
    named = f"{kind.block.removesuffix('_block').replace('_', ' ')} blocks"
    return {"component": kind.component, "base": kind.cut or kind.name, "blocks": named if kind.residual else ""}


def _gate_to_dict(gate: Gate, number: int, ladder: Ladder) -> dict[str, Any]:
    verdicts = [verdict for row in ladder.rows for verdict in row.verdicts if verdict.gate == gate]
    family = [rung.name for rung in ladder.rungs.values() if rung.family == gate.rung]
    return asdict(gate) | {
        "number": number,
        "rung": "|".join(family) or gate.rung,
        "what": GROUP_NAMES.get(gate.what, gate.what),
        "judged": len(verdicts),
        "failed": sum(not verdict.passed for verdict in verdicts),
        "worst": max((verdict.excess for verdict in verdicts), default=None),
    }


def _to_uint8(image: AnyArray) -> np.ndarray[Any, np.dtype[np.uint8]]:
    if image.ndim != 3 or image.shape[2] != 3:
        raise UsageError(f"a picture of shape {image.shape}: the report shows [height, width, 3]")
    if image.dtype == np.uint8:
        return image.astype(np.uint8)
    return (np.nan_to_num(image.astype(np.float64)).clip(0.0, 1.0) * 255.0).round().astype(np.uint8)


def _data_uri(image: np.ndarray[Any, np.dtype[np.uint8]]) -> str:
    """PNG where it is small, WebP at falling quality where it is not."""
    from PIL import Image

    picture = Image.fromarray(image)
    tries = (encode_picture(picture, "webp", MAX_IMAGE_BYTES, quality=quality) for quality in (92, 80, 60))
    small = encode_picture(picture, "png", MAX_IMAGE_BYTES, optimize=True) or next(filter(None, tries), "")
    return small or encode_picture(picture, "webp", quality=30)


def _dump(document: Mapping[str, Any]) -> str:
    """JSON with one line per top-level key and per element of a top-level list: compact, and diffs read well."""
    lines = []
    for key in sorted(document):
        value = document[key]
        text = (
            "[\n" + ",\n".join(map(compact_json, value)) + "\n]"
            if isinstance(value, list) and value
            else compact_json(value)
        )
        lines.append(f"{json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"
