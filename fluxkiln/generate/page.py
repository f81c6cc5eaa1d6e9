"""The local page's server: a Starlette application over a `server.Studio`."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.artifacts.about import read_about
from fluxkiln.documents import SMALL, read_object
from fluxkiln.errors import FluxkilnError, ResourceError, ToolchainError, UsageError
from fluxkiln.generate.painter import default_steps, png_bytes
from fluxkiln.generate.server import ImageJob, Studio, parse_request
from fluxkiln.patches.pipeline import GUIDANCE_SCALE

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request as HttpRequest
    from starlette.responses import Response

TEMPLATES = Path(__file__).parent / "templates"
MOST_BODY = 64_000  # bytes
LOOK_SECONDS = 0.05
_EVENT_NUMBER = re.compile("[0-9]{1,9}")
PING_SECONDS = 15.0
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'"
_HEADERS = {
    "Content-Security-Policy": f"{_POLICY}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def make_app(studio: Studio, hosts: Sequence[str] = LOOPBACK) -> Starlette:
    """The application; ToolchainError when starlette is not installed.

    It answers under the names `hosts`: a page elsewhere that has a name led to this machine is refused.
    """
    try:
        from starlette.applications import Starlette
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware
        from starlette.responses import JSONResponse, Response, StreamingResponse
        from starlette.routing import Route
    except ImportError as error:
        raise ToolchainError(
            f"fluxkiln serve needs starlette and uvicorn ({error}); install them: pip install 'fluxkiln[serve]'"
        ) from error

    facts = describe_studio(studio)
    kinds = {"": "text/html", "serve.css": "text/css", "serve.js": "text/javascript"}
    texts = {name: (_render(f"{name or 'serve.html'}.j2", facts), kind) for name, kind in kinds.items()}

    def refuse(error: FluxkilnError, status: int) -> Response:
        return JSONResponse({"error": {"kind": type(error).__name__, "message": str(error)}}, status, headers=_HEADERS)

    async def page(request: HttpRequest) -> Response:
        text, kind = texts[request.url.path.lstrip("/")]
        return Response(text, media_type=kind, headers=_HEADERS)

    async def bundle(_: HttpRequest) -> Response:
        return JSONResponse(facts, headers=_HEADERS)

    async def submit(request: HttpRequest) -> Response:
        # other sites can post forms here without asking, but not JSON
        if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
            return refuse(UsageError("the request is no JSON; send it as application/json"), 415)
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > MOST_BODY:
                return refuse(UsageError(f"the request is larger than {MOST_BODY} bytes; shorten the prompt"), 413)
        try:
            document = read_object(body, "the request", error=UsageError, remedy='send {"prompt": ...}', limits=SMALL)
            job = studio.submit(parse_request(studio.bundle, document))
        except ResourceError as error:
            return refuse(error, 429)
        except FluxkilnError as error:
            return refuse(error, 400)
        return JSONResponse({"id": job.id}, 202, headers=_HEADERS)

    def gone(request: HttpRequest) -> Response:
        return refuse(UsageError(f"there is no image {request.path_params['id']!r}, or no longer; make it again"), 404)

    async def events(request: HttpRequest) -> Response:
        job = studio.find(request.path_params["id"])
        if job is None:
            return gone(request)
        last = request.headers.get("last-event-id", "")
        start = int(last) + 1 if _EVENT_NUMBER.fullmatch(last) else 0
        return StreamingResponse(_stream(job, start), media_type="text/event-stream", headers=_HEADERS)

    async def image(request: HttpRequest) -> Response:
        job = studio.find(request.path_params["id"])
        if job is None or not job.png:
            return gone(request)
        return Response(job.png, media_type="image/png", headers=_HEADERS)

    async def cancel(request: HttpRequest) -> Response:
        job = studio.find(request.path_params["id"])
        if job is None:
            return gone(request)
        studio.cancel(job)
        return JSONResponse({"state": job.state}, 202, headers=_HEADERS)

    async def reference(_: HttpRequest) -> Response:
        if studio.reference is None:
            return refuse(UsageError("no reference was recorded for this bundle; build it with verification"), 404)
        pixels = (studio.reference.image * 255).round().astype("uint8")
        data = png_bytes(pixels, {"prompt": studio.reference.prompt})
        return Response(data, media_type="image/png", headers=_HEADERS)

    return Starlette(
        routes=[
            *(Route(f"/{name}", page) for name in texts),
            Route("/api/bundle", bundle),
            Route("/api/jobs", submit, methods=["POST"]),
            Route("/api/jobs/{id}", cancel, methods=["DELETE"]),
            Route("/api/jobs/{id}/events", events),
            Route("/api/jobs/{id}/image.png", image),
            Route("/api/reference.png", reference),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)],
    )


def describe_studio(studio: Studio) -> dict[str, Any]:
    """What the page has to know of the bundle, as plain JSON."""
    manifest, reference = studio.bundle.manifest, studio.reference
    shown = reference and {
        "prompt": reference.prompt,
        "seed": reference.seed,
        "steps": reference.steps,
        "guidance": reference.guidance_scale,
    }
    return {
        "name": manifest.name,
        "target": manifest.target,
        "title": f"{studio.bundle.model.title}-{manifest.variant}",
        **asdict(manifest.shapes),
        "sizes": [asdict(shapes) for shapes in studio.bundle.sizes],
        "digest": studio.bundle.digest,
        "executor": dict(studio.painter.executor.facts),
        "weights": read_about(manifest.parity).get("weights", "not known"),
        "takes_guidance": studio.bundle.takes_guidance,
        "steps": default_steps(studio.bundle),
        "guidance": GUIDANCE_SCALE,
        "reference": shown,
    }


async def _stream(job: ImageJob, start: int) -> AsyncIterator[str]:
    """A job's events from number `start` on, as server-sent events, up to its last one."""
    seen, quiet = start, 0.0
    while True:
        while seen < len(job.events):
            yield f"id: {seen}\ndata: {json.dumps(job.events[seen])}\n\n"
            seen, quiet = seen + 1, 0.0
        if job.ended and seen >= len(job.events):
            return
        await asyncio.sleep(LOOK_SECONDS)
        quiet += LOOK_SECONDS
        if quiet >= PING_SECONDS:
            yield ": still here\n\n"
            quiet = 0.0


def _render(name: str, facts: dict[str, Any]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=select_autoescape(enabled_extensions=("html.j2",), default=False),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    return environment.get_template(name).render(**facts, facts_json=json.dumps(facts))
