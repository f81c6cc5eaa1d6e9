"""What tests share: what each marker needs, and the compiler's environment."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pytest

from fluxkiln.compile.plan import Binary
from fluxkiln.compile.templates import make_template
from fluxkiln.compile.toolchains.tpu_mlir.cast import cast_file
from fluxkiln.compile.toolchains.tpu_mlir.environment import TpuMlirEnv, default_tpu_mlir_root, find_tpu_mlir
from fluxkiln.compile.toolchains.tpu_mlir.moulds import Mould, cast_part, compile_part, make_mould
from fluxkiln.export.checkpoint import Checkpoint, open_checkpoint
from fluxkiln.patches.flux1.kinds import list_parts
from fluxkiln.patches.flux1.model import MODEL
from fluxkiln.progress import Silent
from fluxkiln.settings import Settings
from fluxkiln.types import Part, Shapes, find_part
from fluxkiln.verify.reference import Recording, record_reference, view_recording
from tests.builds import Build
from tests.calibrated import calibrated as calibrated


@pytest.fixture(scope="session", autouse=True)
def interrupts_arrive() -> None:
    """A shell that starts the tests in the background has them ignore Ctrl-C, and so all commands they start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


# The server, its password file and the independent client; all are Debian packages.
REGISTRY_PROGRAMS = ("docker-registry", "htpasswd", "skopeo")
HUB_VARIABLE = "FLUXKILN_TEST_HUB"

# Nothing is fetched in a test: all checkpoints are synthetic.
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what cannot run here, and say why."""
    missing = {}
    if find_tpu_mlir(default_tpu_mlir_root()) is None:
        missing["tpu_mlir"] = f"no finished TPU-MLIR environment in {default_tpu_mlir_root()}: run `make env-tpu-mlir`"
    if absent := [name for name in REGISTRY_PROGRAMS if shutil.which(name) is None]:
        missing["registry"] = f"{', '.join(absent)} not installed: run .ci/test-tools as root"
    if not os.environ.get(HUB_VARIABLE):
        missing["hub"] = f"talks to huggingface.co: set {HUB_VARIABLE}=ORG/REPO and HF_TOKEN"
    for item in items:
        for marker, reason in missing.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The source checkout."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture
def start_python():
    """Start a script in another Python; whatever still runs at the end of the test is killed."""
    started = []

    def start(script: str, *args: object) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", script, *map(str, args)],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def tpu_mlir() -> TpuMlirEnv:
    """The finished TPU-MLIR environment; for tests marked `tpu_mlir`."""
    env = find_tpu_mlir(default_tpu_mlir_root())
    assert env is not None, "the test lacks the marker tpu_mlir"
    return env


SMALLEST = Shapes(height=32, width=32, tokens=16)  # what the tiny presets are built at
TINY_SHAPES = Shapes(height=64, width=64, tokens=32)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Checkpoint]:
    """preset -> its synthetic checkpoint, made once a session. Not to be written to."""
    from fluxkiln.export.synth import synthesize

    @functools.cache
    def make(preset: str = "tiny-dev") -> Checkpoint:
        return open_checkpoint(synthesize(preset, tmp_path_factory.mktemp("checkpoints") / preset))

    return make


@pytest.fixture(scope="session")
def tiny_recording(
    tiny_checkpoint: Callable[..., Checkpoint], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Recording]:
    """(preset, vae, shapes) -> the recorded reference run of two steps, made once a session."""

    @functools.cache
    def make(preset: str = "tiny-dev", vae: Literal["kl", "tiny"] = "kl", shapes: Shapes = TINY_SHAPES) -> Recording:
        checkpoint = tiny_checkpoint(preset)
        parts = list_parts(checkpoint.configs, vae)
        folder = tmp_path_factory.mktemp("recording")
        return record_reference(checkpoint, parts, shapes, folder)

    return make


@pytest.fixture(scope="session")
def record_parts(
    tiny_checkpoint: Callable[..., Checkpoint], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Recording]:
    """(preset, parts, shapes) -> a reference run of two steps in which these parts were recorded."""

    def record(preset: str, parts: tuple[Part, ...], shapes: Shapes = TINY_SHAPES) -> Recording:
        checkpoint, folder = tiny_checkpoint(preset), tmp_path_factory.mktemp("recording")
        return record_reference(checkpoint, parts, shapes, folder)

    return record


@pytest.fixture(scope="session")
def hoisted_recording(
    tiny_checkpoint: Callable[..., Checkpoint], record_parts: Callable[..., Recording]
) -> Callable[..., Recording]:
    """(preset, vae, shapes) -> the hoisted form's view of a run of two steps that was recorded for both forms."""

    @functools.cache
    def make(preset: str = "tiny-dev", vae: Literal["kl", "tiny"] = "kl", shapes: Shapes = TINY_SHAPES) -> Recording:
        configs = tiny_checkpoint(preset).configs
        both = record_parts(preset, MODEL.recorded_parts(configs, vae), shapes)
        return view_recording(both, MODEL, list_parts(configs, vae, "hoisted"))

    return make


@pytest.fixture(scope="session")
def part_of_kind(
    tiny_checkpoint: Callable[..., Checkpoint],
    tiny_recording: Callable[..., Recording],
    hoisted_recording: Callable[..., Recording],
) -> Callable[..., tuple[Part, Recording]]:
    """(kind, shapes) -> tiny-dev's first part of the kind, and a recording of the form and VAE that have it."""

    def make(kind: str, shapes: Shapes = TINY_SHAPES) -> tuple[Part, Recording]:
        vae: Literal["kl", "tiny"] = "tiny" if kind == "tiny_vae_decoder" else "kl"
        for modulation, record in (("inline", tiny_recording), ("hoisted", hoisted_recording)):
            for part in list_parts(tiny_checkpoint().configs, vae, modulation):  # type: ignore[arg-type]
                if part.kind == kind:
                    return part, record("tiny-dev", vae, shapes)
        raise AssertionError(f"no form has the kind {kind}")

    return make


@pytest.fixture(scope="session")
def small_build(
    tiny_checkpoint: Callable[..., Checkpoint], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Build]:
    """(model, scheme, target) -> a build of the smallest shapes with counts of its own.

    All have one store, so that a mould is compiled once a session. For tests marked `tpu_mlir`.
    """
    from fluxkiln.build.make import prepare

    folder = tmp_path_factory.mktemp("kiln")

    def make(model: str | Path = "tiny-dev", scheme: str = "W4BF16", target: str = "bm1684x") -> Build:
        root = model if isinstance(model, Path) else tiny_checkpoint(model).root
        settings = Settings(
            target, str(root), scheme=scheme, build_dir=folder / "build", store=folder / "store", modulation="inline"
        )
        prepared = prepare(settings)
        assert prepared.plan.shapes == SMALLEST
        return Build(prepared.checkpoint, prepared.plan, prepared.cache)

    return make


@pytest.fixture(scope="session")
def cast_and_direct(
    cast_alone: Callable[[Build, str], Binary],
) -> Callable[..., tuple[Mould, Binary, Binary]]:
    """(kiln, part) -> its kind's mould, the part cast into it, the part compiled; both compilers at once.

    The `bmodel` of the cast part is the file in which it is alone.
    """

    def make(small_build: Build, name: str) -> tuple[Mould, Binary, Binary]:
        part = find_part(small_build.parts, name)
        template = make_template(*small_build, part.kind, "onnx17")
        with ThreadPoolExecutor(2) as pool:
            mould = pool.submit(make_mould, *small_build, template)
            direct = pool.submit(compile_part, *small_build, part, template)
        return mould.result(), cast_alone(small_build, name), direct.result()

    return make


@pytest.fixture(scope="session")
def cast_alone() -> Callable[[Build, str], Binary]:
    """(kiln, part) -> the part cast into its kind's mould; its `bmodel` is the file in which it is alone."""

    def make(small_build: Build, name: str) -> Binary:
        part = find_part(small_build.parts, name)
        mould = make_mould(*small_build, make_template(*small_build, part.kind, "onnx17"))
        assert mould.castable, mould.why
        file, (binary,) = cast_file(
            *small_build, f"{name}.bmodel", [cast_part(small_build.plan, part, mould)], Silent()
        )
        return replace(binary, blobs={**binary.blobs, "bmodel": file.blob})

    return make


@dataclass
class RegistryServer:
    """Debian's docker-registry on a free port of this machine; state in `root`, configuration as JSON, which is YAML.

    `secret`: without it uploads do not outlive the process. `read_only`: it then refuses to store anything.
    """

    root: Path
    port: int
    users: dict[str, str]
    read_only: bool = False
    process: subprocess.Popen | None = None

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        storage = {"filesystem": {"rootdirectory": str(self.root / "data")}, "delete": {"enabled": True}}
        if self.read_only:
            storage["maintenance"] = {"readonly": {"enabled": True}}
        config = {
            "version": 0.1,
            "log": {"level": "error", "accesslog": {"disabled": True}},
            "storage": storage,
            "http": {"addr": self.host, "secret": "of the tests"},
        }
        if self.users:
            file = self.root / "htpasswd"
            for number, (user, password) in enumerate(self.users.items()):
                command = ["htpasswd", "-i", "-B", "-C", "4", *(["-c"] if not number else []), str(file), user]
                subprocess.run(command, input=password, text=True, check=True, capture_output=True)
            config["auth"] = {"htpasswd": {"realm": "tests", "path": str(file)}}
        (self.root / "config.yml").write_text(json.dumps(config))
        with (self.root / "log").open("ab") as log:
            command = ["docker-registry", "serve", str(self.root / "config.yml")]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        self._wait()

    def kill(self) -> None:
        """End it as a power cut would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def blob(self, digest: str) -> Path:
        """Where it keeps the bytes of a blob."""
        name = digest.removeprefix("sha256:")
        return self.root / "data/docker/registry/v2/blobs/sha256" / name[:2] / name / "data"

    def _wait(self) -> None:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=2):
                    return
            except OSError:
                time.sleep(0.02)
        raise AssertionError((self.root / "log").read_text()[-2000:])


@pytest.fixture
def start_registry(tmp_path: Path):
    """Start a registry, with users or read-only if asked for; all end with the test."""
    started = []

    def start(name: str = "registry", *, read_only: bool = False, **users: str) -> RegistryServer:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        server = RegistryServer(tmp_path / name, port, users, read_only)
        server.start()
        started.append(server)
        return server

    yield start
    for server in started:
        server.kill()
