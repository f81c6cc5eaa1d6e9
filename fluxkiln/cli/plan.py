"""`fluxkiln plan`: whether a build fits, how fast its images come and how long it takes, on one screen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from fluxkiln.cli.options import SettingsFor, TargetCommand, settings_options
from fluxkiln.cli.output import Output, count_text, json_option, open_progress, seconds_text
from fluxkiln.errors import ResourceError
from fluxkiln.settings import Settings, parse_bytes
from fluxkiln.verify.report.page import size as size_text

UNKNOWN = "unknown"
_SPENT = ("step_ms", "image_ms")
# where what a net takes is known from -> how that is said
_ORIGINS = {
    "weights": "of the weights alone; all else is unknown",
    "shapes": "of weights by their shapes; what activations and the runtime take is estimated",
    "measured": "of the same nets, measured before",
    "compiled": "of the moulds in the store",
}


@click.command(cls=TargetCommand)
@click.argument("target")
@click.option(
    "--budget",
    "budgets",
    multiple=True,
    metavar="SIZE",
    help="bm1684x: mix schemes of blocks so that denoising fits in so much, 7615MiB say. May be repeated.",
)
@click.option(
    "--measure", is_flag=True, help="Run MODEL's blocks in every such scheme first, and mix by what they lose."
)
@click.option("--jobs-list", is_flag=True, help="List every job too, and what the store has of it.")
@settings_options
@json_option
@click.pass_obj
def plan_command(
    output: Output, settings_for: SettingsFor, target: str, budgets: tuple[str, ...], measure: bool, jobs_list: bool
) -> None:
    """Say whether a build fits, how fast its images come, how long it takes; build nothing.

    Nothing is fetched and no large checkpoint is read, but with --measure. With --json, the list of jobs can feed
    another scheduler.
    """
    settings = settings_for(target)
    from fluxkiln.build.make import plan as make_plan

    with open_progress() as progress:
        planned = make_plan(settings, tuple(map(parse_bytes, budgets)), measure, progress)
    output.document(planned)
    devices: Mapping[str, Any] = planned["devices"]
    totals, shapes = planned["totals"], planned["shapes"]
    size = f"{shapes['width']}x{shapes['height']}, {shapes['tokens']} text tokens"
    size += f", and {count_text(len(planned['further']), 'further size')}" * bool(planned["further"])
    output.line(f"{planned['name']} for {planned['target']}: {planned['scheme']}, {size}")
    output.line()
    facts = {"verdict": _verdict(planned)}
    if devices:
        facts |= {
            **_device(settings, devices["budget"]),
            "chips": _chips(len(devices["peaks"][devices["closest"]])),
            "speed": _speed(devices.get("estimate")),
            "figures": _origin(settings, devices),
        }
    output.facts({
        **facts,
        "time": _time(planned["seconds"], totals),
        "disk": f"about {size_text(totals['disk_bytes'])} to write",
        "a size more": "" if planned["further"] else _second_size(planned, totals),
        "memory": f"about {size_text(totals['memory_peak_bytes'])} at most, on the machine that builds",
        "download": f"{size_text(fetched)}, part of that disk" if (fetched := totals["download_bytes"]) else "",
        "refused": f"a build would not start: {planned['refused']}" if devices and planned["refused"] else "",
        "jobs": f"{totals['jobs']}, {totals['to_do']} to do" + "; --jobs-list shows them" * (not jobs_list),
    })  # fmt: skip
    if devices:
        _show_files(output, devices)
    if planned["further"]:
        _show_further(output, planned["further"])
    if planned["forms"]:
        _show_forms(output, settings, planned["forms"])
    if mixtures := planned.get("mixtures"):
        _show_mixtures(output, mixtures)
    if jobs_list:
        _show_jobs(output, planned["jobs"])
    if planned["refused"]:
        raise ResourceError(planned["refused"])


def _verdict(planned: Mapping[str, Any]) -> str:
    devices = planned["devices"]
    if not devices:
        return planned["refused"] or "can be built here; the target is not planned for the memory of a device"
    load = devices["closest"]
    peak = max(devices["peaks"][load])
    chips = len(devices["peaks"][load])
    spread = f" on the fullest of {chips} chips" if chips > 1 else ""
    taken = f"{size_text(peak)} of {size_text(devices['budget'])}{spread}, {load}"
    if devices["load"] is None:
        return f"does not fit: it takes {taken}"
    if devices["origin"] == "weights":
        return f"not known yet: weights alone take {taken}; instructions and run-time memory come on top"
    return f"fits: {taken}"


def _device(settings: Settings, budget: int) -> dict[str, str]:
    """Whose memory that is, and how another is named."""
    from fluxkiln.compile.targets import find_target

    target = find_target(settings.target)
    boards = {board.name.lower(): board for board in target.boards}
    board = boards.get(settings.board.lower()) if settings.board else next(iter(boards.values()), None)
    if board is None:
        return {"device": f"{size_text(budget)} on each core; --instance and --tp choose others"}
    names = ", ".join(one.name for one in target.boards)
    default = ", the default" * (not settings.board)
    origin = "as given" if settings.device_memory else f"{board.name}{default}: {board.source}"
    return {"device": f"{size_text(budget)}, {origin}", "boards": f"--board {names}; any other by --device-memory"}


def _chips(count: int) -> str:
    return f"{count}, one after the other: more hold more and are no faster" if count > 1 else ""


def _speed(estimate: Mapping[str, Any] | None) -> str:
    if not estimate or estimate["step_ms"] is None:
        return UNKNOWN
    image = UNKNOWN if estimate["image_ms"] is None else f"about {seconds_text(estimate['image_ms'] / 1000)}"
    return (
        f"about {estimate['step_ms'] / 1000:.3g} s a step, an image of {estimate['steps']} steps {image}, by the "
        "compiler's estimate; no board ran"
    )


def _origin(settings: Settings, devices: Mapping[str, Any]) -> str:
    found = _ORIGINS[devices["origin"]]
    if devices["origin"] == "compiled" or "measured" not in devices:
        return found
    source = f" by `{devices['measured']['command']}`" if devices["origin"] == "measured" else ""
    command = f"fluxkiln mould build {settings.target} --model {settings.model}"
    return f"{found}{source}; `{command}` (some minutes, same options) finds this build's own"


def _time(seconds: Mapping[str, Any], totals: Mapping[str, Any]) -> str:
    if not totals["to_do"]:
        return "none: the store has all of it"
    moulds = f" ({seconds_text(seconds['with_moulds'])} with moulds)" if seconds["with_moulds"] is not None else ""
    verify = f", to verify {seconds_text(seconds['verify'])}" if seconds["verify"] else ""
    return (
        f"about {seconds_text(seconds['now'])} now; in all to make {seconds_text(seconds['cold'])}{moulds}{verify}; by "
        f"{seconds['source']}, here {count_text(seconds['workers'], 'core')}"
    )


def _second_size(planned: Mapping[str, Any], totals: Mapping[str, Any]) -> str:
    from fluxkiln.compile.targets import find_target
    from fluxkiln.compile.toolchain import toolchain_of

    seconds, shapes = planned["seconds"]["second_size"], planned["shapes"]
    if not seconds:
        return ""
    takes = f"about {seconds_text(seconds)} to make, {size_text(totals['second_size_bytes'])} to write"
    if toolchain_of(find_target(planned["target"])).many_sizes:
        own = f"{shapes['width']}x{shapes['height']}"
        return f"in the same bundle (--size {own},WIDTHxHEIGHT): {takes}; it tells what each takes on a device"
    return f"a build of its own (--size WIDTHxHEIGHT): {takes}; what takes no picture is shared"


def _show_further(output: Output, further: list[Mapping[str, Any]]) -> None:
    rows = [
        (
            one["size"],
            seconds_text(max(one["seconds"], 0)),
            size_text(one["disk_bytes"]),
            _size(one["device_bytes"]),
        )
        for one in further
    ]
    output.line()
    output.table(("further size", ">to make", ">to write", ">on the device"), rows)


def _show_files(output: Output, devices: Mapping[str, Any]) -> None:
    texts, sizes = ("file", "device", "phase"), ("weights", "instructions", "runtime", "total")
    output.line()
    output.table(
        (*texts, *(">" + name for name in sizes)),
        [[*(file[name] for name in texts), *(_size(file[name]) for name in sizes)] for file in devices["files"]],
    )
    output.line()
    peaks = {way: ", ".join(map(size_text, peaks)) for way, peaks in devices["peaks"].items()}
    output.facts(peaks | {"a device gives to models": size_text(devices["budget"])})


def _show_forms(output: Output, settings: Settings, forms: list[Mapping[str, Any]]) -> None:
    rows = []
    for form in forms:
        own = "this one" * ((form["vae"], form["modulation"]) == (settings.vae, settings.modulation))
        if form["why"]:
            rows.append([form["vae"], form["modulation"], "-", form["why"], "-", "-", own])
            continue
        estimate = form["estimate"] or {"step_ms": None, "image_ms": None}
        spent = [UNKNOWN if (ms := estimate[name]) is None else seconds_text(ms / 1000) for name in _SPENT]
        more = " and more" * (form["origin"] == "weights")
        peak, load = size_text(form["peak"]) + more, form["load"] or "does not fit"
        rows.append([form["vae"], form["modulation"], peak, load, *spent, own])
    output.line()
    output.table(("vae", "modulation", ">on the device", "loaded", ">a step", ">an image", ""), rows)


def _show_mixtures(output: Output, mixtures: list[Mapping[str, Any]]) -> None:
    rows = [
        (
            size_text(one["budget"]),
            size_text(one["bytes"]),
            UNKNOWN if one["step_ms"] is None else seconds_text(one["step_ms"] / 1000),
            UNKNOWN if one["error"] is None else f"{100 * one['error']:.2g} %",
            ", ".join(f"{count} {scheme}" for scheme, count in one["blocks"].items()),
            one["scheme"],
        )
        for one in mixtures
    ]
    output.line()
    output.table((">budget", ">while denoising", ">a step", ">a block loses", "blocks", "--scheme"), rows)
    output.line(f"The fastest mixtures, of such the nearest; what a block loses was {mixtures[0]['errors']}.")


def _show_jobs(output: Output, jobs: list[Mapping[str, Any]]) -> None:
    columns = list(dict.fromkeys(key for job in jobs for key in job))
    names = [">" * _is_bytes(column) + column.replace("_", " ") for column in columns]
    output.line()
    output.table(names, [[_cell(column, job.get(column)) for column in columns] for job in jobs])


def _is_bytes(name: str) -> bool:
    return name.split("_")[-1] in ("memory", "bytes", "size")


def _cell(name: str, value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    return size_text(value) if _is_bytes(name) and isinstance(value, int | float) else str(value)


def _size(count: int | None) -> str:
    return UNKNOWN if count is None else size_text(count)
