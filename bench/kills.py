"""`kill -9` at random moments, again and again: whether builds end with the same digests, and nothing is lost."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.figure import WORK, Figure, fluxkiln
from bench.lives import Case, start_case, warm_up
from fluxkiln.artifacts.store import open_store
from fluxkiln.compile.toolchains.tpu_mlir.environment import default_tpu_mlir_root, find_tpu_mlir
from fluxkiln.digests import digest_bytes
from fluxkiln.errors import FluxkilnError

FOLDER = WORK / "kills"
KILLS = 34  # of each work that takes seconds
BUILD_KILLS = 12
MODEL, COMPONENTS = "tiny-dev", "text_encoder"
# A kill comes within the time that the work takes undisturbed, or this at least.
LEAST_SECONDS = 1.0
PARTIAL = ".partial"


@dataclass(frozen=True, slots=True)
class Work:
    """What is killed.

    Attributes:
        command: arguments in a folder; `ends`: exit codes of a success.
        state: what must be the same at the end as without a kill, of a folder.
        prepare: makes the folder ready, once.
        forget: removes what it made, so that it begins anew after it ended.
    """

    name: str
    command: Callable[[Path], Sequence[str]]
    state: Callable[[Path], object]
    prepare: Callable[[Path], object] = lambda folder: None
    forget: Callable[[Path], object] = lambda folder: None
    ends: tuple[int, ...] = (0,)
    kills: int = KILLS


@dataclass(slots=True)
class Outcome:
    """`kills` that met a running command, `finished` before theirs; `faults` are sentences."""

    kills: int = 0
    finished: int = 0
    faults: list[str] = field(default_factory=list)


def measure() -> Figure:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    warm_up()
    order = random.Random(int(os.environ.get("SEED", "0")))
    outcomes = {}
    for work in works():
        print(f"{time.strftime('%H:%M:%S')} {work.name}", file=sys.stderr, flush=True)
        outcomes[work.name] = kill(work, order)
        print(f"{work.name}: {outcomes[work.name]}", file=sys.stderr, flush=True)
    rows = [(name, str(one.kills), str(one.finished), str(len(one.faults))) for name, one in outcomes.items()]
    totals = (sum(getattr(one, name) for one in outcomes.values()) for name in ("kills", "finished"))
    rows.append(("all", *map(str, totals), str(sum(len(one.faults) for one in outcomes.values()))))
    return Figure(
        "Killed at random moments",
        ("work", "kills", "ended before its kill", "faults"),
        tuple(rows),
        (
            "Each command is started again and again, in a fork of a process that has imported what it needs, and "
            "ended with all its processes by SIGKILL, after a time that is drawn from the one that it takes "
            f"undisturbed. Builds are of {MODEL}'s {COMPONENTS}. After every kill each blob of the store "
            "has the digest that it is named by, and what a folder shows under a final name is whole. At the end the "
            "work is done undisturbed: digests are those of a folder that was never killed, and nothing unfinished is "
            "left. A fault is whatever is not so.",
        ),
    )


def works() -> Iterator[Work]:
    """What is killed here, in order: later ones use what the first ones built.

    Without TPU-MLIR's environment what needs it is left out.
    """
    yield _build("cpu")
    yield _fuse()
    yield from _registry()
    yield _collection()
    yield _build("trn1", (0, 5))
    if find_tpu_mlir(default_tpu_mlir_root()):
        yield _build("bm1684x")
        yield _mould_import()


def calm_folder(name: str) -> Path:
    """Where a work was done undisturbed."""
    return FOLDER / name.replace(" ", "-") / "calm"


def kill(work: Work, order: random.Random) -> Outcome:
    outcome, calm, folder = Outcome(), calm_folder(work.name), calm_folder(work.name).with_name("killed")
    for one in (calm, folder):
        one.mkdir(parents=True)
        work.prepare(one)
    began = time.monotonic()
    code = _finish(work, calm)
    takes = max(time.monotonic() - began, LEAST_SECONDS)
    if code not in work.ends:
        return Outcome(faults=[f"undisturbed it ends with {code}"])
    wanted = work.state(calm)
    while outcome.kills < work.kills and outcome.finished < 4 * work.kills:
        process, until = _start(work, folder), time.monotonic() + order.uniform(0.0, takes)
        while (ended := _ended(process)) is None and time.monotonic() < until:
            time.sleep(0.002)
        if ended is None:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
            outcome.kills += 1
            if work.state(folder) == wanted:  # all was done but the end of the process; some refuse to do it twice
                work.forget(folder)
        else:
            outcome.finished += 1
            if ended not in work.ends:
                outcome.faults.append(f"it ends with {ended} after {outcome.kills} kills")
            work.forget(folder)
        outcome.faults += _damage(folder)
    code = _finish(work, folder)
    if code not in work.ends:
        outcome.faults.append(f"at the end it ends with {code}")
    if (found := work.state(folder)) != wanted:
        outcome.faults.append(f"at the end there is {found}, undisturbed {wanted}")
    outcome.faults += _damage(folder)
    outcome.faults += [f"{path} is left" for path in folder.rglob("*") if path.name.endswith(PARTIAL)]
    return outcome


def _start(work: Work, folder: Path) -> int:
    environ = {"XDG_CACHE_HOME": str(folder / "cache"), "DOCKER_CONFIG": str(folder)}
    return start_case(Case(work.command(folder), environ), folder.with_name("log"))


def _ended(process: int) -> int | None:
    """Its exit code, None while it runs."""
    done, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def _finish(work: Work, folder: Path) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(_start(work, folder), 0)[1])


def _damage(folder: Path) -> list[str]:
    """Blobs of stores and files of bundles that are not what their names and manifests say."""
    from fluxkiln.artifacts.intact import read_bundle

    faults = []
    for blob in folder.rglob("blobs/sha256/*"):
        if len(blob.name) == 64 and hashlib.sha256(blob.read_bytes()).hexdigest() != blob.name:
            faults.append(f"{blob} has other bytes than its name says")
    for manifest in folder.rglob("bundle/manifest.json"):
        if PARTIAL in str(manifest) or "/." in str(manifest.relative_to(folder)):
            continue
        try:
            read_bundle(manifest.parent)
        except FluxkilnError as error:
            faults.append(str(error))
    return faults


def _build(target: str, ends: tuple[int, ...] = (0,)) -> Work:
    def command(folder: Path) -> list[str]:
        what = ("--model", MODEL, "--components", COMPONENTS)
        return ["build", target, *what, "--no-verify", "--build-dir", str(folder)]

    return Work(f"build {target}", command, _bundle_digests, forget=_forget_results, ends=ends, kills=BUILD_KILLS)


def _bundle_digests(folder: Path) -> object:
    return {
        str(manifest.relative_to(folder)): json.loads(manifest.read_bytes())["digest"]
        for manifest in folder.rglob("bundle/manifest.json")
    }


def _forget_results(folder: Path) -> None:
    """As if nothing had been built: only the checkpoint stays."""
    for name in ("store", "cpu", "trn1", "bm1684x"):
        shutil.rmtree(folder / name, ignore_errors=True)


def _fuse() -> Work:
    import torch
    from safetensors.torch import save_file

    from fluxkiln.export.synth import synthesize

    model, style = synthesize("tiny-dev", FOLDER / "tiny-dev"), FOLDER / "style.safetensors"
    layer = "transformer.transformer_blocks.1.attn.to_q"
    width = json.loads((model / "transformer" / "config.json").read_bytes())
    inner = width["attention_head_dim"] * width["num_attention_heads"]
    save_file({f"{layer}.lora_A.weight": torch.ones(1, inner), f"{layer}.lora_B.weight": torch.ones(inner, 1)}, style)

    def command(folder: Path) -> list[str]:
        return ["fuse", str(model), str(folder / "fused"), "--lora", str(style)]

    return Work("fuse", command, _tree("fused"), forget=lambda folder: shutil.rmtree(folder / "fused"))


def _tree(name: str) -> Callable[[Path], object]:
    """Digests of all files below a folder."""
    return lambda folder: {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((folder / name).rglob("*"))
        if path.is_file()
    }


def _registry() -> list[Work]:
    """A registry that is a folder: publishing into it, pulling out of it."""
    bundle = next((calm_folder("build cpu") / "cpu").glob("*/bundle"))
    layout = f"oci-layout:{FOLDER / 'layout'}:v1"
    licence = ("--accept-license", "flux-1-dev")
    subprocess.run(fluxkiln("publish", str(bundle), layout, *licence), check=True, capture_output=True)
    return [
        Work(
            "publish",
            lambda folder: ["publish", str(bundle), f"oci-layout:{folder / 'layout'}:v1", *licence],
            _tree("layout/blobs"),
            forget=lambda folder: shutil.rmtree(folder / "layout"),
        ),
        Work(
            "pull",
            lambda folder: ["pull", layout, str(folder / "pulled")],
            _tree("pulled"),
            forget=lambda folder: shutil.rmtree(folder / "pulled"),
        ),
    ]


def _collection() -> Work:
    """A store full of what nothing needs, beside what a tag reaches."""
    source = calm_folder("build cpu") / "store"

    def fill(folder: Path) -> None:
        shutil.copytree(source, folder / "store", dirs_exist_ok=True)
        store = open_store(folder / "store")
        for number in range(2000):
            data = f"needed by nobody {number}".encode()
            path = store.path(digest_bytes(data))
            path.write_bytes(data)  # nobody needs it on the disk at once either
            os.utime(path, (0, 0))

    def command(folder: Path) -> list[str]:
        return ["cache", "gc", "--store", str(folder / "store")]

    return Work("cache gc", command, _tree("store/blobs"), prepare=fill, forget=fill)


def _mould_import() -> Work:
    file, store = FOLDER / "moulds.tar", calm_folder("build bm1684x") / "store"
    command = fluxkiln("mould", "export", str(file), "--store", str(store))
    subprocess.run(command, check=True, capture_output=True)
    return Work(
        "mould import",
        lambda folder: ["mould", "import", str(file), "--store", str(folder / "store")],
        _tree("store/blobs"),
        forget=lambda folder: shutil.rmtree(folder / "store"),
    )
