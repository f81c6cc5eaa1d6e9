"""`fluxkiln serve`."""

from __future__ import annotations

import errno
import ipaddress
import socket
from pathlib import Path

import click

from fluxkiln.cli.bundle import bundle_folder
from fluxkiln.cli.output import Output, json_option
from fluxkiln.cli.progress import open_progress
from fluxkiln.cli.usage import BundleCommand
from fluxkiln.errors import ResourceError, ToolchainError, UsageError

PORT = 7860


@click.command(cls=BundleCommand)
@click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="A bundle, or the folder of a build.",
)
@click.option("--host", metavar="ADDRESS", default="127.0.0.1", help="Where to listen. Default: this machine only.")
@click.option("--port", type=int, metavar="N", default=PORT, help=f"Default: {PORT}; 0 picks a free one.")
@click.option("--executor", metavar="NAME", help="What runs the parts, see below. Default: by the bundle.")
@click.option("--device", type=int, metavar="N", default=0, help="The number of the board that runs it. Default: 0.")
@click.option("--threads", type=int, metavar="N", default=0, help="Threads of one operation. Default: all cores.")
@json_option
@click.pass_obj
def serve(output: Output, bundle: Path, host: str, port: int, executor: str | None, device: int, threads: int) -> None:
    """Open a local page to type a prompt and watch the steps.

    One image is made at a time, the others wait in a queue. With the reference's settings an image is compared with
    it. Ctrl-C ends the page.
    """
    with listen(host, port) as listening:
        from fluxkiln.compile.bundle import open_bundle
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
            opened = open_bundle(bundle_folder(bundle), progress)
            painter = Painter(opened, open_executor(opened, executor, threads=threads, device=device))
        with Studio(painter, find_reference(opened)) as studio:
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


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


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
