"""`fluxkiln generate` and `fluxkiln serve`: images from a bundle, into files or on a local page."""

from __future__ import annotations

import errno
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fluxkiln.cli.bundle import bundle_folder
from fluxkiln.cli.options import PATH, BundleCommand, read_size
from fluxkiln.cli.output import Output, count_text, json_option, open_progress, parity_text, path_text, seconds_text
from fluxkiln.errors import ResourceError, ToolchainError, UsageError
from fluxkiln.settings import MOST_COUNT, MOST_SEED, parse_text, read_prompts
from fluxkiln.verify.report.page import size as size_text

if TYPE_CHECKING:
    from fluxkiln.compile.bundle import Bundle
    from fluxkiln.generate.painter import Painter, Request, Texts
    from fluxkiln.types import Shapes

PORT = 7860
MOST_IMAGES, MOST_THREADS, MOST_BOARDS = 10_000, 1024, 1024
# The images of a prompt have the seeds that follow.
SEED = click.IntRange(0, MOST_SEED - MOST_IMAGES)
THREADS = click.IntRange(0, MOST_THREADS)
BOARD = click.IntRange(0, MOST_BOARDS)


def read_device(ctx: click.Context, param: click.Parameter, value: str | None) -> int | str | None:
    """The number of a board, or what a runtime calls a device."""
    if value is None or not value.removeprefix("-").isdecimal():
        return value if value is None else parse_text(value)
    return int(BOARD(value, param, ctx))


device_option = click.option(
    "--device",
    callback=read_device,
    metavar="N|NAME",
    help="The number of the board that runs it, or what a runtime calls a device: GPU. Default: 0, or the CPU.",
)


@click.command(cls=BundleCommand)
@click.argument("prompts", nargs=-1, metavar="PROMPT...")
@click.option("--bundle", type=PATH, required=True, metavar="DIR", help="A bundle, or the folder of a build.")
@click.option(
    "--prompts", "file", type=PATH, metavar="FILE",
    help="A file with a prompt on each line; lines that begin with # are left out.",
)  # fmt: skip
@click.option("--prompt-2", metavar="TEXT", help="What T5 gets, if not the prompt itself.")
@click.option(
    "--steps", type=click.IntRange(max=MOST_COUNT), metavar="N", help="Denoising steps. Default: dev 28, schnell 4."
)
@click.option("--guidance", type=float, metavar="X", help="Guidance scale, dev only. Default: 3.5.")
@click.option("--seed", type=SEED, metavar="N", default=0, help="Seed of the first image of a prompt; others follow.")
@click.option(
    "--n-images",
    type=click.IntRange(max=MOST_IMAGES),
    metavar="N",
    default=1,
    help="Images of each prompt. Default: 1.",
)
@click.option("--rows", "--n-rows", type=int, metavar="N", help="Write a grid of all images as well, in N rows.")
@click.option("--save-raw", is_flag=True, help="No grid, each image by itself. This is the default.")
@click.option("--size", metavar="WIDTHxHEIGHT", help="One of the bundle's sizes. Default: its first.")
@click.option("--tokens", type=int, metavar="N", help="One of its numbers of text tokens. Default: the first.")
@click.option("--executor", metavar="NAME", help="What runs the parts, see below. Default: by the bundle.")
@device_option
@click.option("--threads", type=THREADS, metavar="N", help="Threads of one operation. Default: all cores.")
@click.option(
    "--fast",
    is_flag=True,
    help="Packed weights on a CPU: round activations to 8 bits as well, which is not what was verified. Measured "
    "with W4BF16: 0.75 of the time; latents move by 0.3 %, where the weights' rounding moved them by 5.4 %.",
)
@click.option(
    "--quantize",
    is_flag=True,
    help="MLX: put plain weights into codes of 4 bits while they are loaded, as its FLUX example does.",
)
@click.option(
    "--no-t5-padding", is_flag=True, help="MLX: text as long as the prompt, not filled up to the bundle's tokens."
)
@click.option("--embeddings", type=PATH, metavar="FILE", help="Prompts that are encoded already. Default: all of them.")
@click.option("--save-embeddings", type=PATH, metavar="FILE", help="Write what the text encoders made of the prompts.")
@click.option(
    "--encoders", type=PATH, metavar="DIR",
    help="Another bundle with the same text encoders, for cpu say, that encodes the prompts; this one needs none then.",
)  # fmt: skip
@click.option("--out", type=PATH, default=Path("images"), help="A folder, or one .png file. Default: ./images.")
@click.option("--save-latents", is_flag=True, help="Write each image's packed latents beside it, as .npy.")
@json_option
@click.pass_obj
def generate_command(
    output: Output,
    /,
    prompts: tuple[str, ...],
    bundle: Path,
    file: Path | None,
    seed: int,
    n_images: int,
    rows: int | None,
    save_raw: bool,
    size: str | None,
    executor: str | None,
    device: int | str | None,
    threads: int | None,
    fast: bool,
    quantize: bool,
    no_t5_padding: bool,
    embeddings: Path | None,
    save_embeddings: Path | None,
    encoders: Path | None,
    out: Path,
    save_latents: bool,
    **asked: Any,
) -> None:
    """Make images from a bundle; no checkpoint is needed.

    The loop is that of diffusers' pipeline, in numpy, on the bundle's parts. Each PNG carries its prompt, its seed and
    the bundle's digest.
    """
    texts = (*map(parse_text, prompts), *(read_prompts(file) if file else ()))
    asked["prompt_2"] = parse_text(asked["prompt_2"]) if asked["prompt_2"] else None
    from fluxkiln.generate.embeddings import read_embeddings
    from fluxkiln.generate.embeddings import save_embeddings as save

    given = read_embeddings(embeddings) if embeddings else None
    wanted = [(text, asked["prompt_2"], not no_t5_padding) for text in texts] or list(given.prompts if given else ())
    if not wanted:
        raise UsageError("there is no prompt; give one, or --prompts FILE with one on each line")
    if n_images < 1:
        raise UsageError(f"--n-images {n_images}: at least 1 is needed")
    count = len(wanted) * n_images
    if rows is not None and not 1 <= rows <= count:
        raise UsageError(f"--rows {rows}: there will be {count_text(count, 'image')}; give from 1 to {count}")
    if save_raw and rows is not None:
        raise UsageError(f"--save-raw: it writes no grid, and --rows {rows} asks for one; leave one of them out")
    if _is_file(out) and count > 1:
        raise UsageError(f"--out {out}: one file for {count} images; name a folder")
    if not _is_file(out) and out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file, and no .png; name a folder or a .png file")
    checked = read_size(size)
    from fluxkiln.compile.bundle import require_pipeline
    from fluxkiln.compile.opener import open_bundle
    from fluxkiln.compile.toolchain import open_executor
    from fluxkiln.generate.painter import Painter, Request, check_request, choose_size
    from fluxkiln.progress import Laps

    asked |= {"size": checked}
    requests = [
        Request(text, seed + number, **{**asked, "prompt_2": second, "padded": padded})
        for text, second, padded in wanted
        for number in range(n_images)
    ]
    options = {"threads": threads, "device": device, "fast": fast, "quantize": quantize, "no-t5-padding": no_t5_padding}
    laps = Laps()
    with open_progress() as progress:
        opened = open_bundle(bundle_folder(bundle), progress)
        require_pipeline(opened, encoded=bool(given or encoders))
        if given:
            given.check(opened)
        if (parity := opened.manifest.parity).get("verified") and not parity.get("passed"):
            progress.note(
                f"parity of this bundle {parity_text(parity)}: its images may differ from what diffusers makes"
            )
        laps.lap("check")
        for request in requests:
            check_request(opened, request)
        opened = opened.at(choose_size(opened, checked, asked["tokens"]))
        runner = open_executor(opened, executor, **options)
        with Painter(opened, runner, laps, dict(given.prompts) if given else {}) as painter:
            laps.lap("open")
            origin = given.encoders if given else opened.encoders
            if encoders:
                origin = _encode_with(bundle_folder(encoders), painter, wanted, progress)
            if save_embeddings:
                painter.known |= {prompt: painter.encode(*prompt) for prompt in wanted}
                save(save_embeddings, origin, {prompt: painter.known[prompt] for prompt in wanted})
            if (step := getattr(painter.executor, "step_seconds", 0.0)) > 5:
                progress.note(f"{painter.executor.name} takes about {seconds_text(step)} for a step of the transformer")
            document = _paint(painter, requests, out, rows, save_latents, progress)
            facts = dict(painter.executor.facts)
            document["timings"] = {name: round(seconds, 3) for name, seconds in laps.seconds.items()}
            document["part_seconds"] = round(painter.part_seconds, 3)
    document["peak_memory"] = peak_bytes()
    output.document({"bundle": str(opened.folder), "digest": opened.digest, "executor": facts, **document})
    _show(output, opened, facts, document)


def _encode_with(folder: Path, painter: Painter, prompts: Sequence[Texts], progress: Any) -> str:
    """Have the text encoders of another bundle encode what the painter does not know yet; what they are."""
    from fluxkiln.compile.opener import open_bundle
    from fluxkiln.compile.toolchain import open_executor
    from fluxkiln.generate.embeddings import check_encoders
    from fluxkiln.generate.painter import Painter, choose_size

    other = open_bundle(folder, progress)
    check_encoders(painter.bundle, other.encoders, f"--encoders {folder}")
    own = other.at(choose_size(other, None, painter.bundle.shapes.tokens))
    with Painter(own, open_executor(own)) as encoder:
        painter.known |= {one: encoder.encode(*one) for one in prompts if one not in painter.known}
    return other.encoders


def peak_bytes() -> int:
    """The most memory that was resident at once, mapped weights included: of this process or of one that it started."""
    import resource
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def _is_file(out: Path) -> bool:
    return out.suffix.lower() == ".png"


def _paint(
    painter: Painter, requests: Sequence[Request], out: Path, rows: int | None, save_latents: bool, progress: Any
) -> dict[str, Any]:
    import numpy as np

    from fluxkiln.generate.painter import describe_picture, make_grid, paint, png_bytes

    (out.parent if _is_file(out) else out).mkdir(parents=True, exist_ok=True)
    rendered, notes = [], dict[str, None]()
    entries: list[dict[str, Any]] = []
    for number, picture in enumerate(paint(painter, requests, progress)):
        path = out if _is_file(out) else out / f"{number:03d}-seed{picture.request.seed}.png"
        facts = describe_picture(painter.bundle, painter.executor.name, picture.request)
        path.write_bytes(png_bytes(picture.image, facts))
        entries.append(
            {
                "file": str(path),
                "prompt": picture.request.prompt,
                "prompt_2": picture.request.prompt_2,
                "seed": picture.request.seed,
                "steps": int(facts["steps"]),
                **({"guidance": float(facts["guidance"])} if "guidance" in facts else {}),
                "seconds": round(picture.seconds, 3),
            }
        )
        if save_latents:
            np.save(path.with_suffix(".npy"), picture.latents)
            entries[-1]["latents"] = str(path.with_suffix(".npy"))
        rendered.append(picture.image)
        notes.update(dict.fromkeys(picture.notes))
    document: dict[str, Any] = {"images": entries, "notes": list(notes)}
    if rows is not None:
        facts = describe_picture(painter.bundle, painter.executor.name, requests[0])
        facts |= {"prompt": "\n".join(dict.fromkeys(request.prompt for request in requests))}
        grid = out.with_name(f"{out.stem}-grid.png") if _is_file(out) else out / "grid.png"
        grid.write_bytes(png_bytes(make_grid(rendered, rows), facts))
        document["grid"] = str(grid)
    painter.laps.lap("write")
    return document


def _show(output: Output, bundle: Bundle, facts: Mapping[str, str], document: Mapping[str, Any]) -> None:
    from fluxkiln.artifacts.about import read_about

    images, timings = document["images"], document["timings"]
    steps = sum(image["steps"] for image in images)
    first = Path(images[0]["file"])
    output.facts(
        {
            "images": path_text(first) if len(images) == 1 else f"{path_text(first.parent)} ({len(images)} images)",
            "grid": path_text(Path(document["grid"])) if "grid" in document else "",
            "bundle": f"{bundle.manifest.name} for {bundle.manifest.target}, {bundle.digest}",
            "weights": read_about(bundle.manifest.parity).get("weights", ""),
            "executor": f"{facts['runtime']}; {facts['device']}",
            "time": ", ".join(f"{name} {seconds_text(seconds)}" for name, seconds in timings.items() if seconds > 0.05),
            "step": f"{seconds_text(timings.get('denoise', 0.0) / max(steps, 1))} on average of {steps}",
            "peak memory": size_text(document["peak_memory"]),
        }
    )


@click.command(cls=BundleCommand)
@click.option("--bundle", type=PATH, required=True, metavar="DIR", help="A bundle, or the folder of a build.")
@click.option("--host", metavar="ADDRESS", default="127.0.0.1", help="Where to listen. Default: this machine only.")
@click.option("--port", type=int, metavar="N", default=PORT, help=f"Default: {PORT}; 0 picks a free one.")
@click.option("--executor", metavar="NAME", help="What runs the parts, see below. Default: by the bundle.")
@device_option
@click.option("--threads", type=THREADS, metavar="N", help="Threads of one operation. Default: all cores.")
@json_option
@click.pass_obj
def serve_command(
    output: Output,
    bundle: Path,
    host: str,
    port: int,
    executor: str | None,
    device: int | str | None,
    threads: int | None,
) -> None:
    """Open a local page to type a prompt and watch the steps.

    One image is made at a time, the others wait in a queue. With the reference's settings an image is compared with
    it. Ctrl-C ends the page.
    """
    with listen(host, port) as listening:
        from fluxkiln.artifacts.registry.place import is_loopback
        from fluxkiln.compile.opener import open_bundle
        from fluxkiln.compile.toolchain import open_executor
        from fluxkiln.generate.page import LOOPBACK, make_app
        from fluxkiln.generate.painter import Painter
        from fluxkiln.generate.server import Studio, find_reference

        try:
            import uvicorn
        except ImportError as error:
            raise ToolchainError(
                f"fluxkiln serve needs starlette and uvicorn ({error}); install them: pip install 'fluxkiln[serve]'"
            ) from error
        with open_progress() as progress:
            opened = open_bundle(bundle_folder(bundle), progress, whole=True)

            def open_painter(shapes: Shapes) -> Painter:
                own = opened.at(shapes)
                return Painter(own, open_executor(own, executor, threads=threads, device=device))

            made = Studio(opened, open_painter, find_reference(opened))
        with made as studio:
            app = make_app(studio, LOOPBACK if is_loopback(host) else ("*",))
            url = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}/"
            output.document({"url": url, "bundle": str(opened.folder), "digest": opened.digest})
            output.line(f"{opened.manifest.name} at {url}; Ctrl-C ends it")
            if not is_loopback(host):
                click.echo(f"note: everybody who reaches {host} can use this page; there is no password", err=True)
            config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2, lifespan="off")
            try:
                uvicorn.Server(config).run(sockets=[listening])
            except KeyboardInterrupt:
                return  # how it is meant to end


def listen(host: str, port: int) -> socket.socket:
    """A bound socket.

    Raises:
        UsageError: no such address or port. ResourceError: the port is taken.
    """
    if not 0 <= port <= 65535:
        raise UsageError(f"port {port}: it must be from 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise UsageError(f"host {host}: {error.strerror}; give an address of this machine") from error
    listening = socket.socket(family, kind, protocol)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
        listening.listen()
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise ResourceError(
                f"port {port} of {host} is in use; give another with --port, 0 picks a free one"
            ) from error
        if error.errno == errno.EACCES:
            raise UsageError(f"port {port} needs root's rights; give one from 1024 on with --port") from error
        raise UsageError(f"host {host}: {error.strerror}; give an address of this machine") from error
    return listening
