"""Several bundles side by side: one page from their report.json documents, which needs no network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fluxkiln.errors import UsageError
from fluxkiln.verify.gates import PIPELINE
from fluxkiln.verify.report.charts import Cell, at_build_shapes, keep_worst, shade_of, value_of
from fluxkiln.verify.report.document import FACTS, IMAGE_TIME, page_environment, plain, read_rungs
from fluxkiln.verify.report.page import compact_json, embed_document, number, seconds

_Document = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a table: what it is about, and a cell per bundle. `equal`: all cells say the same."""

    name: str
    cells: tuple[Any, ...]

    @property
    def equal(self) -> bool:
        return len({compact_json(cell) for cell in self.cells}) == 1


@dataclass(frozen=True, slots=True)
class ErrorCell(Cell):
    """The worst error of a kind in one bundle: relative L2 against the reference, in which part, and at which rung."""

    rung: str

    @property
    def shade(self) -> int:
        return shade_of(self.value)


def render_comparison(documents: Sequence[_Document]) -> str:
    """One HTML page that holds the reports against one another.

    Args:
        documents: of `build_report`, as built or as read back; two or more.

    Raises UsageError: fewer than two.
    """
    if len(documents) < 2:
        raise UsageError(f"{len(documents)} report: two or more can be compared")
    from markupsafe import Markup

    known = [plain(document) for document in documents]
    embedded = embed_document({"reports": [{key: doc[key] for key in doc if key != "images"} for doc in known]})
    page: str = (
        page_environment()
        .get_template("comparison.html.j2")
        .render(
            reports=[dict.fromkeys(FACTS) | document for document in known],
            names=short_names(known),
            facts=[line for line in fact_lines(known) if any(line.cells)],
            rungs=rung_lines(known),
            kinds=kind_lines(known),
            costs=cost_lines(known),
            provenance=[line for line in provenance_lines(known) if not line.equal],
            same=[line for line in provenance_lines(known) if line.equal],
            embedded=Markup(embedded.text),
            packed=embedded.packed,
        )
    )
    return page


def short_names(documents: Sequence[_Document]) -> list[str]:
    """What each bundle is called in a column: its title, with its target where titles are the same."""
    titles = [str(document["title"]) for document in documents]
    named = [
        f"{title} ({document['target']})" if titles.count(title) > 1 else title
        for title, document in zip(titles, documents, strict=True)
    ]
    return [
        f"{name} #{named[: index + 1].count(name)}" if named.count(name) > 1 else name
        for index, name in enumerate(named)
    ]


def fact_lines(documents: Sequence[_Document]) -> list[Line]:
    """Target, model, shapes, schemes and what was compared."""

    def shapes(document: _Document) -> str:
        found = document.get("shapes") or {}
        size = f"{found['width']} x {found['height']}" if "width" in found else ""
        return ", ".join([size] * bool(size) + [f"{found[key]} {key}" for key in ("tokens", "steps") if key in found])

    def schemes(document: _Document) -> str:
        by_scheme: dict[str, list[str]] = {}
        for kind, scheme in (document.get("schemes") or {}).items():
            by_scheme.setdefault(str(scheme), []).append(str(kind))
        return "; ".join(f"{scheme}: {', '.join(kinds)}" for scheme, kinds in by_scheme.items())

    def images(document: _Document) -> str:
        found = document.get("runs") or {}
        psnr = next((line for line in found.get("statistics") or () if line["unit"] == "dB"), None)
        if psnr is None:
            return ""
        mean, worst = float(psnr["mean"]), float(psnr["worst"])
        return f"{len(found['entries'])}, {mean:.1f} dB in the mean, {worst:.1f} dB at worst"

    def judged(document: _Document) -> str:
        found = document.get("judged")
        if not found:
            return ""
        near = found["reference"]
        return (
            f"{float(found['facts']):.1f} % (diffusers {float(found['diffusers']):.1f} %, chance "
            f"{float(found['chance']):.1f} %); PSNR {float(near['psnr']):.1f} dB, SSIM {float(near['ssim']):.3f}, "
            f"distance {float(near['distance']):.4f}"
        )

    def recorded(document: _Document) -> str:
        given = document.get("provenance") or {}
        return ", ".join(f"{name} {given[name]}" for name in ("prompt", "seed") if name in given)

    def painted(document: _Document) -> str:
        """The recorded run's image by parts: rung, errors and time."""
        rows = {row["output"]: row for row in document["rows"] if row["part"] == PIPELINE}
        found = {output: row["vs_reference"] for output, row in rows.items()}
        told = [f"rung {rows['image']['rung']}"] if "image" in rows else []
        told += [f"latents off by {number(found['latents']['relative_l2'])}"] if "latents" in found else []
        told += [f"{number(found['image']['psnr'])} dB"] if "image" in found else []
        took = [one["seconds"] for one in document.get("timings") or () if one["name"] == IMAGE_TIME]
        return ", ".join([*told, *map(seconds, took)])

    asked: tuple[tuple[str, Callable[[_Document], str]], ...] = (
        ("target", lambda document: str(document["target"])),
        ("model", lambda document: str((document.get("model") or {}).get("name", ""))),
        ("weights", lambda document: str((document.get("about") or {}).get("weights", ""))),
        ("what ran", lambda document: str((document.get("about") or {}).get("ran", ""))),
        ("shapes", shapes),
        ("schemes", schemes),
        ("recorded run", recorded),
        ("its image by parts", painted),
        ("images of prompts and seeds", images),
        ("facts of prompts that hold", judged),
        ("comparisons", lambda document: f"{document['summary']['rows']}, {document['summary']['failed']} missed"),
    )
    return [Line(name, tuple(ask(document) for document in documents)) for name, ask in asked]


def rung_lines(documents: Sequence[_Document]) -> list[Line]:
    """Per rung the row that came closest to its gate; None where a bundle was not run there."""
    summaries = [{rung["rung"]: rung for rung in document["summary"]["rungs"]} for document in documents]
    known = {name: rung for document in documents for name, rung in read_rungs(document).items()}
    names = sorted({name for summary in summaries for name in summary}, key=lambda name: known[name].order)
    return [Line(name, tuple(summary.get(name) for summary in summaries)) for name in names]


def kind_lines(documents: Sequence[_Document]) -> list[Line]:
    """Per kind of part its worst error at the highest rung that computes; None where a bundle has no such kind.

    Forms of one kind that take their modulation in other ways share a line.
    """
    tables = [_worst_by_kind(document) for document in documents]
    kinds = list(dict.fromkeys(kind for table in tables for kind in table))
    return [Line(kind, tuple(table.get(kind) for table in tables)) for kind in kinds]


def cost_lines(documents: Sequence[_Document]) -> list[Line]:
    """Bytes, memory on a device, the estimate and the times of the builds; (kind of number, value) or None."""

    def ask(what: str, get: Callable[[_Document], Any]) -> Line:
        found = [get(document) for document in documents]
        return Line(what, tuple(None if value in (None, 0) else value for value in found))

    def peak(document: _Document) -> Any:
        devices = document.get("devices") or {}
        peaks = (devices.get("peaks") or {}).get(devices.get("load")) or ()
        return ("size", max(peaks)) if peaks else None

    def stored(document: _Document) -> Any:
        total = sum(float(part["bytes"]) for part in document.get("parts") or ())
        return ("size", total) if total else None

    lines = [ask("binaries of all parts", stored), ask("most at once on a device", peak)]
    for section in ("estimate", "lowering"):
        entries = [(document.get(section) or {}).get("entries") or {} for document in documents]
        for name in dict.fromkeys(name for entry in entries for name in entry):
            lines.append(Line(str(name), tuple(("text", entry[name]) if name in entry else None for entry in entries)))
    times = [{t["name"]: t["seconds"] for t in document.get("timings") or ()} for document in documents]
    for name in dict.fromkeys(name for time in times for name in time):
        cells = tuple(("seconds", time[name]) if name in time else None for time in times)
        lines.append(Line(f"{name}, this build", cells))
    return [line for line in lines if any(cell is not None for cell in line.cells)]


def provenance_lines(documents: Sequence[_Document]) -> list[Line]:
    """Tools, machine and provenance, by name."""
    lines = []
    for section in ("tools", "machine", "provenance"):
        tables = [document.get(section) or {} for document in documents]
        for name in dict.fromkeys(name for table in tables for name in table):
            lines.append(Line(str(name), tuple(str(table.get(name, "")) for table in tables)))
    return lines


def _worst_by_kind(document: _Document) -> dict[str, ErrorCell]:
    rungs, kinds = read_rungs(document), document["kinds"]
    computing = [
        (kinds[row["kind"]]["base"] if row["kind"] in kinds else str(row["kind"]), rungs[row["rung"]].order, row)
        for row in at_build_shapes(document["rows"])
        if rungs[row["rung"]].order and not rungs[row["rung"]].exact
    ]
    top: dict[str, int] = {}
    for kind, order, _ in computing:
        top[kind] = max(top.get(kind, 0), order)
    found: dict[str, ErrorCell] = {}
    for kind, order, row in computing:
        if order == top[kind]:
            keep_worst(found, kind, ErrorCell(value_of(row, "delta"), row["passed"], row["part"], row["rung"]))
    return found
