"""Hostile inputs through the command line: tracebacks, bugs, lives beyond a deadline, memory, by group of inputs."""

from __future__ import annotations

import http.client
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import click

from bench.figure import ROOT, Figure, fluxkiln, tree_bytes
from bench.lives import FOLDER, SIGNS, Case, Group, run_group, warm_up
from bench.peers import hostile_registry
from fluxkiln.artifacts.intact import encode_record
from fluxkiln.digests import digest_bytes, seal
from tests.hostile.readers import READERS, samples

DEADLINE = 3  # seconds, of commands that take one


def measure() -> Figure:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    warm_up()
    groups = {name: run_group(name, cases) for name, cases in make_groups(FOLDER).items()}
    groups["requests"] = ask_page(FOLDER, FOLDER / "made" / "bundle", 200)
    rows = [
        (
            name, str(group.inputs), str(group.refused), *map(str, group.signs), f"{group.late:.1f} s",
            f"{group.peak_bytes / 1e6:.0f} MB",
        )
        for name, group in groups.items()
    ]  # fmt: skip
    every = list(groups.values())
    signs = [str(sum(group.signs[number] for group in every)) for number in range(len(SIGNS))]
    late, peak = max(group.late for group in every), max(group.peak_bytes for group in every)
    total, refused = sum(group.inputs for group in every), sum(group.refused for group in every)
    rows.append(("all", str(total), str(refused), *signs, f"{late:.1f} s", f"{peak / 1e6:.0f} MB"))
    for group in every:
        for line in group.worst:
            print(line, file=sys.stderr)
    return Figure(
        "Hostile inputs",
        ("inputs", "count", "refused", "tracebacks", "bugs", "longest life", "peak memory"),
        tuple(rows),
        (
            "Valid documents and files with some values replaced, left out, exchanged or repeated, files with bits "
            "changed and pieces cut out, servers that lie, wait, drip and never end. Each input is a process of its "
            "own, forked from one that has imported torch and diffusers, whose memory counts. A life is the time "
            f"beyond --deadline {DEADLINE} for what speaks to a registry, else all of it. What was not refused was "
            "spoiled where it does not count. Aim: no tracebacks, no bugs, 5 s beyond a deadline, 1 GB.",
        ),
    )


def draw(name: str, count: int, seeds: Sequence[bytes] = ()) -> list[bytes]:
    """So many spoiled samples of a reader, the same in every run."""
    from hypothesis import HealthCheck, Phase, given, settings

    from tests.hostile.spoiled import spoiled

    found: list[bytes] = []

    @settings(
        max_examples=count + count // 4, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(data=spoiled(seeds or samples(name), READERS[name].document))
    def take(data: bytes) -> None:
        found.append(data)

    take()
    random.Random(name).shuffle(found)
    return found[:count]


def make_groups(folder: Path) -> dict[str, Iterator[Case]]:
    """The groups; a case's files are written when it is asked for."""
    from fluxkiln.export.checkpoint import open_checkpoint
    from fluxkiln.export.synth import synthesize
    from tests.eager import make_bundle

    os.environ |= {"XDG_CACHE_HOME": str(folder / "cache"), "DOCKER_CONFIG": str(folder), "HF_HUB_OFFLINE": "1"}
    model = synthesize("tiny-dev", folder / "tiny-dev")
    bundle = make_bundle(open_checkpoint(model), folder / "made")
    free = make_bundle(open_checkpoint(synthesize("tiny-schnell", folder / "tiny-schnell")), folder / "made-free")
    return {
        "configs": _checkpoints(folder, model, _spoiled_configs(model, 300)),
        "safetensors headers": _checkpoints(folder, model, _spoiled_headers(250)),
        "LoRAs": _loras(folder, model, 250),
        "manifests": _bundles(
            folder, bundle, "manifest.json", draw("manifest", 250, [(bundle / "manifest.json").read_bytes()])
        ),
        "configs of bundles": _bundles(folder, bundle, "configs.json", draw("configs", 100)),
        "graphs of bundles": _bundles(folder, bundle, "onnx/tail.onnx", draw("graph", 150)),
        "images from bundles": _images(folder, model, 150),
        "artifacts": _layouts(folder, free, 200),
        "registries": _registries(folder, 200),
        "logins": _logins(folder, 100),
        "moulds": _moulds(folder, 150),
        "arguments": _arguments(folder, model, bundle, 200),
    }


def _spoiled_configs(model: Path, count: int) -> Iterator[tuple[str, bytes]]:
    names = [f"{name}/config.json" for name in ("transformer", "text_encoder", "text_encoder_2", "vae", "vae_tiny")]
    names += ["scheduler/scheduler_config.json", "model_index.json", "tokenizer_2/tokenizer_config.json"]
    names += ["transformer/diffusion_pytorch_model.safetensors.index.json", "tokenizer/vocab.json"]
    for name in names:
        for data in draw("configs", count // len(names), [(model / name).read_bytes()]):
            yield name, data


def _spoiled_headers(count: int) -> Iterator[tuple[str, bytes]]:
    for data in draw("safetensors", count):
        yield "vae_tiny/diffusion_pytorch_model.safetensors", data


def _checkpoints(folder: Path, model: Path, files: Iterator[tuple[str, bytes]]) -> Iterator[Case]:
    for name, data in files:
        copy = _linked(model, folder / "spoiled")
        _put(copy / name, data)
        yield Case(["plan", "cpu", "--model", str(copy), "--vae", "tiny", "--build-dir", str(folder / "build")])


def _loras(folder: Path, model: Path, count: int) -> Iterator[Case]:
    from fluxkiln.export.checkpoint import open_checkpoint
    from tests.export.loras import Q, peft, write

    shapes = {name: ref.shape for name, ref in open_checkpoint(model).tensors["transformer"].items()}
    fitting = write(folder / "fitting.safetensors", peft(shapes, Q, rank=1)).read_bytes()
    for data in (*draw("lora", count // 2), *draw("lora", count // 2, [fitting])):
        shutil.rmtree(folder / "fused", ignore_errors=True)
        _put(folder / "style.safetensors", data)
        yield Case(["fuse", str(model), str(folder / "fused"), "--lora", str(folder / "style.safetensors")])


def _bundles(folder: Path, bundle: Path, name: str, spoilt: Sequence[bytes]) -> Iterator[Case]:
    """Every other one with digests and records put right, as who knows the format does."""
    for number, data in enumerate(spoilt):
        copy = _linked(bundle, folder / "bundle")
        _put(copy / name, data)
        if number % 2:
            with suppress(ValueError, AttributeError, TypeError, KeyError, RecursionError):
                _put_right(copy, name, data)
        yield Case([("verify", "inspect")[number // 2 % 2], str(copy)])


def _images(folder: Path, model: Path, count: int) -> Iterator[Case]:
    """An image from a whole bundle, of which a file that is read on the way was spoiled and all digests put right."""
    command = ["build", "cpu", "--model", str(model), "--no-verify", "--size", "32x32", "--tokens", "16"]
    subprocess.run(fluxkiln(*command, "--build-dir", str(folder / "whole")), check=True, capture_output=True)
    (bundle,) = (folder / "whole" / "cpu").glob("*/bundle")
    readers = {
        "host/constants.safetensors": "constants", "tokenizer/vocab.json": "vocabulary",
        "tokenizer/tokenizer_config.json": "vocabulary", "tokenizer_2/tokenizer.json": "tokenizer",
        "scheduler/scheduler_config.json": "scheduler",
    }  # fmt: skip
    for name, reader in readers.items():
        for data in draw(reader, count // len(readers), [(bundle / name).read_bytes()]):
            copy = _linked(bundle, folder / "bundle")
            _put(copy / name, data)
            _put_right(copy, name, data)
            image = ["--steps", "1", "--threads", "1", "--out", str(folder / "x.png")]
            yield Case(["generate", "a kiln", "--bundle", str(copy), *image])


def _put_right(bundle: Path, name: str, data: bytes) -> None:
    manifest = bundle / "manifest.json"
    document = json.loads(manifest.read_bytes())
    if name != manifest.name:
        facts = {"sha256": digest_bytes(data).removeprefix("sha256:"), "size": len(data)}
        next(file for file in document["files"] if file["path"] == name).update(facts)
        for part in document["parts"]:
            if part["file"] == name:
                part.update(digest=digest_bytes(data), size=len(data))
    sealed = seal({key: value for key, value in document.items() if key != "digest"})
    _put(manifest, json.dumps(sealed).encode())
    if (bundle / "build.json").exists():
        _put(bundle / "build.json", encode_record({}, [str(sealed["digest"])]))


def _layouts(folder: Path, bundle: Path, count: int) -> Iterator[Case]:
    """An OCI layout: its index, the artifact's manifest and config."""
    yield Case(["publish", str(bundle), f"oci-layout:{folder / 'layout'}:v1"])
    layout = folder / "layout"
    index = json.loads((layout / "index.json").read_bytes())
    first = layout / "blobs" / index["manifests"][0]["digest"].replace(":", "/")
    manifest = json.loads(first.read_bytes())
    config = (layout / "blobs" / manifest["config"]["digest"].replace(":", "/")).read_bytes()
    sources = {"index": (layout / "index.json").read_bytes(), "manifest": first.read_bytes(), "config": config}
    for what, data in sources.items():
        for number, spoilt in enumerate(draw("oci-manifest", count // 3, [data])):
            copy = _linked(layout, folder / "spoiled-layout")
            if what == "index":
                _put(copy / "index.json", spoilt)
            elif what == "config":
                changed = {**manifest, "config": {**manifest["config"], **_blob(copy, spoilt)}}
                _point(copy, index, json.dumps(changed).encode())
            else:
                _point(copy, index, spoilt)
            reference = f"oci-layout:{copy}:v1"
            shutil.rmtree(folder / "pulled", ignore_errors=True)
            commands = (
                ["pull", reference, str(folder / "pulled")],
                ["inspect", reference],
                ["ls", f"oci-layout:{copy}"],
            )
            yield Case(commands[number % 3])


def _blob(layout: Path, data: bytes) -> dict[str, Any]:
    digest = digest_bytes(data)
    _put(layout / "blobs" / digest.replace(":", "/"), data)
    return {"digest": digest, "size": len(data)}


def _point(layout: Path, index: dict[str, Any], manifest: bytes) -> None:
    entry = {**index["manifests"][0], **_blob(layout, manifest)}
    _put(layout / "index.json", json.dumps({**index, "manifests": [entry]}).encode())


def _registries(folder: Path, count: int) -> Iterator[Case]:
    """A server whose every answer is one of many lies: documents, and streams that wait, drip or never end."""
    with hostile_registry(folder / "answers") as (host, answers):
        for number, answer in enumerate(answers(count, draw("oci-answer", count))):
            answer()
            shutil.rmtree(folder / "pulled", ignore_errors=True)
            where = f"{host}/flux"
            commands = (["ls", where], ["pull", f"{where}:v1", str(folder / "pulled")], ["inspect", f"{where}:v1"])
            more = ["--deadline", str(DEADLINE), "--plain-http"]
            yield Case([*commands[number % 3], *more], deadline=DEADLINE)


def _logins(folder: Path, count: int) -> Iterator[Case]:
    with hostile_registry(folder / "answers") as (host, answers):
        (challenge,) = answers(1, [])
        seeds = [data.replace(b"registry.example", host.encode()) for data in samples("credentials")]
        for data in draw("credentials", count, seeds):
            challenge()
            _put(folder / "docker" / "config.json", data)
            environ = {"DOCKER_CONFIG": str(folder / "docker")}
            yield Case(["ls", f"{host}/flux", "--deadline", str(DEADLINE)], environ, DEADLINE)


def _moulds(folder: Path, count: int) -> Iterator[Case]:
    for data in draw("moulds", count):
        shutil.rmtree(folder / "moulds", ignore_errors=True)
        _put(folder / "moulds.tar", data)
        yield Case(["mould", "import", str(folder / "moulds.tar"), "--store", str(folder / "moulds")])


def ask_page(folder: Path, bundle: Path, count: int) -> Group:
    """One page for all requests; what it answers with 500, or says in an event or its log, counts."""
    group, log = Group(), folder / "page"
    command = [sys.executable, "-m", "fluxkiln", "serve", "--bundle", str(bundle), "--port", "0", "--json"]
    with log.open("wb") as errors:
        page = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        document = "".join(iter(page.stdout.readline, "}\n")) + "}"
        port = int(json.loads(document)["url"].rsplit(":", 1)[1].strip("/"))
        for data in draw("request", count):
            began = time.monotonic()
            status, answer = _ask(port, "POST", "/api/jobs", data)
            if status == 202:
                path = f"/api/jobs/{json.loads(answer)['id']}/events"
                status, answer = _ask(port, "GET", path, b"", {"Last-Event-ID": data[:9].decode("latin-1").strip()})
            group.inputs += 1
            group.refused += status >= 400
            group.signs[0] += status >= 500
            group.signs[1] += SIGNS[1] in answer
            group.late = max(group.late, time.monotonic() - began)
            group.peak_bytes = max(group.peak_bytes, tree_bytes(page.pid))
        group.signs[0] += log.read_bytes().count(SIGNS[0])
    finally:
        page.kill()
        page.wait()
    return group


def _ask(
    port: int, method: str, path: str, body: bytes, headers: Mapping[str, str] = MappingProxyType({})
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json", **headers})
        answer = connection.getresponse()
        return answer.status, answer.read()
    except ValueError:  # no header that could be sent
        return 400, b""
    finally:
        connection.close()


ODD = (
    b"", b" ", b"-", b"--", b"-x", b"\xff\xfe", b"\x1b[2J", b"../../etc/passwd", b"a" * 5000, b"0", b"-1", b"nan",
    b"1e400", b"9" * 40, b"W4BF16,head=F32,head=BF16", b"group:0", b"0x0", b"99999999x16", b"oci-layout:", b"hf://", b"hf://a/b@",
    b"127.0.0.1:1/x:y", b"[::1", "größe".encode(), b"$(id)", b"%s", b"x" * 255, b"a\nb", b"*",
)  # fmt: skip


def _arguments(folder: Path, model: Path, bundle: Path, count: int) -> Iterator[Case]:
    from fluxkiln.cli.main import fluxkiln_command

    order = random.Random(0)
    context = fluxkiln_command.make_context("fluxkiln", ["--json"], resilient_parsing=True)
    # what takes minutes is left out; `plan` reads what `build` reads
    long = ("serve", "train", "recipe", "build", "debug", "calibrate", "judge")
    names = [name for name in fluxkiln_command.list_commands(context) if name not in long]
    sound = [str(model).encode(), str(bundle).encode(), b"cpu", b"bm1684x", b"tiny-dev"]
    for _ in range(count):
        given: list[str | bytes] = [order.choice(names)]
        command: Any = fluxkiln_command.get_command(context, str(given[0]))
        while isinstance(command, click.Group):
            given.append(order.choice(command.list_commands(context)))
            command = command.get_command(context, str(given[-1]))
        options = [one for one in command.params if one.param_type_name == "option" and one.name != "help"]
        for option in order.sample(options, min(len(options), order.randint(0, 2))):
            given.append(max(option.opts, key=len))
            if not getattr(option, "is_flag", False):
                given.append(order.choice(ODD))
        given += [order.choice((*ODD, *sound)) for _ in range(order.randint(0, 2))]
        yield Case(given)


def _linked(source: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(source, target, copy_function=os.link))


def _put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_bytes(data)
