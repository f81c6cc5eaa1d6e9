"""Images where there is no torch: what is imported, what is installed, and on which machines it can be."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.ran import Run
from tests.stub_compiler import install_stub

ROOT = Path(__file__).resolve().parents[2]
# what a build takes and an image does not
ABSENT = (
    "accelerate", "diffusers", "gguf", "jax", "numba", "onnx_ir", "onnxscript", "peft", "psutil", "scipy",
    "sentencepiece", "skimage", "torch", "torchax", "transformers",
)  # fmt: skip
PATIENCE = 900
# megabytes, on disk, without what runs the parts
MOST_MEGABYTES = 250


def python(*arguments: object, folder: Path, executable: str = sys.executable, **variables: str) -> Run:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    variables = {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache"), **variables}
    done = subprocess.run(
        [executable, *map(str, arguments)], env={**kept, **variables}, cwd=folder, capture_output=True, text=True,
        timeout=PATIENCE, check=False,
    )  # fmt: skip
    return Run(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cpu")
    given = ("--model", "tiny-dev", "--no-verify", "--build-dir", folder / "build", "--json")
    run = python("-m", "fluxkiln", "build", "cpu", *given, folder=folder)
    assert run.code == 0, run.err
    return Path(run.document["bundle"])


@pytest.fixture
def without(tmp_path):
    """Run a command where some packages cannot be imported."""

    def run(packages, *arguments):
        blocked = tmp_path / "blocked"
        blocked.mkdir(exist_ok=True)
        for name in packages:
            missing = f"raise ModuleNotFoundError(\"No module named '{name}'\", name='{name}')\n"
            (blocked / f"{name}.py").write_text(missing)
        return python("-m", "fluxkiln", *arguments, folder=tmp_path, PYTHONPATH=f"{blocked}:{ROOT}")

    return run


def image(bundle, out):
    return "generate", "--bundle", bundle, "a kiln", "--steps", "2", "--seed", "5", "--out", out


@pytest.mark.slow
def test_an_image_without_what_a_build_takes(bundle, without, tmp_path):
    run = without(ABSENT, *image(bundle, "light.png"))
    assert run.code == 0, run.err
    whole = python("-m", "fluxkiln", *image(bundle, "whole.png"), folder=tmp_path)
    assert whole.code == 0, whole.err
    assert (tmp_path / "light.png").read_bytes() == (tmp_path / "whole.png").read_bytes()
    for command in (("inspect", bundle), ("verify", bundle)):
        run = without(ABSENT, *command)
        assert run.code == 0, run.err


@pytest.mark.slow
def test_a_bundle_is_plain_files_and_one_that_did_not_arrive_is_named(bundle, tmp_path):
    paths = [path for path in bundle.rglob("*") if path.is_file()]
    assert len(paths) > 20
    assert [path for path in bundle.rglob("*") if path.is_symlink() or path.name.startswith(".")] == []
    for left_out in ("LICENSE", "host/constants.safetensors", "tokenizer_2/spiece.model"):
        copied = tmp_path / left_out.replace("/", "-")
        shutil.copytree(bundle, copied, ignore=lambda folder, names, gone=bundle / left_out: [
            name for name in names if Path(folder) / name == gone
        ])  # fmt: skip
        run = python("-m", "fluxkiln", *image(copied, "x.png"), folder=tmp_path)
        errors = [line for line in run.err.splitlines() if not line.startswith("check: ")]
        assert (run.code, len(errors), f"{left_out}: missing" in errors[-1]) == (4, 1, True), run.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("packages", "command", "extra"),
    [
        (
            ["torch"],
            ("build", "cpu"),
            "torch is not installed, and this command needs it: pip install 'fluxkiln[build]'",
        ),
        (
            ["tokenizers"],
            None,
            "tokenizers is not installed, and this command needs it: pip install 'fluxkiln[runtime]'",
        ),
        (["onnxruntime"], None, "onnxruntime is not installed, and this command needs it: pip install 'fluxkiln[ort]'"),
        (["PIL"], None, "pillow is not installed, and this command needs it: pip install 'fluxkiln[runtime]'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_is_missing_is_named_with_its_extra(bundle, without, packages, command, extra):
    run = without(packages, *(command or image(bundle, "x.png")))
    assert run.code == 5
    assert extra in run.err.splitlines()[-1]
    assert "Traceback" not in run.err


@pytest.mark.parametrize(
    "module",
    ["tpu_mlir.executors", "neuron.device", "neuron.split_bundle", "onnxruntime.toolchain", "mlx.executor"],
)
def test_executors_of_devices_are_light(module, tmp_path):
    script = (
        f"import sys\nimport fluxkiln.compile.toolchains.{module}, fluxkiln.generate.painter\n"
        "import fluxkiln.patches.flux1.pipeline\nprint(*{name.partition('.')[0] for name in sys.modules})\n"
    )
    run = python("-c", script, folder=tmp_path)
    assert run.code == 0, run.err
    assert set(run.out.split()) & set(ABSENT) == set()
    assert "numpy" in run.out.split()


def test_what_a_build_takes_would_be_seen(tmp_path):
    run = python("-c", "import sys, fluxkiln.patches.flux1.published\nprint(*sys.modules)", folder=tmp_path)
    assert {"torch"} <= set(run.out.split()) & set(ABSENT)


def requirements(extra: str) -> list[str]:
    """Those of the distribution and of an extra, as pyproject.toml has them; extras of its own resolved."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found, todo = list(project["dependencies"]), [extra]
    while todo:
        for wanted in project["optional-dependencies"][todo.pop()]:
            own = re.fullmatch(r"fluxkiln\[(\w+)\]", wanted)
            if own:
                todo.append(own[1])
            else:
                found.append(wanted)
    return found


def closure(extra: str) -> set[str]:
    """Names of all distributions that an extra brings on this machine, by the metadata of what is installed."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found: set[str] = set()
    todo = [Requirement(line) for line in requirements(extra)]
    while todo:
        wanted = todo.pop()
        name = canonicalize_name(wanted.name)
        if name in found or (wanted.marker and not wanted.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        todo += [Requirement(line) for line in importlib.metadata.requires(name) or ()]
    return found


def test_the_runtime_brings_nothing_of_a_build():
    heavy = {name.replace("_", "-") for name in ABSENT} | {"scikit-image", "llvmlite"}
    assert closure("runtime") & heavy == set()
    assert {"onnx", "onnxruntime"} & closure("runtime") == set()
    assert closure("ort") & heavy == set()
    assert {"torch", "diffusers", "transformers", "numba"} <= closure("build")


def tags(url: str) -> str:
    return url.rsplit("/", 1)[-1].removesuffix(".whl").rsplit("-", 1)[-1]


def resolve(extra: str, platforms: tuple[str, ...], folder: Path) -> Run:
    """What pip would install on another machine, by the metadata of the index; nothing is installed."""
    wanted = [f"--platform={platform}" for platform in platforms]
    return python(
        "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed", "--report", "report.json", "--target",
        "there", "--implementation", "cp", "--python-version", "3.11", "--only-binary=:all:", *wanted, "--constraint",
        ROOT / "constraints.txt", *requirements(extra), folder=folder,
    )  # fmt: skip


@pytest.mark.thorough
@pytest.mark.parametrize("extra", ["runtime", "ort"])
def test_there_is_a_wheel_of_everything_for_aarch64(extra, tmp_path):
    """glibc 2.28 and older: Ubuntu 20.04, which boards have, is newer."""
    platforms = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
    run = resolve(extra, platforms, tmp_path)
    assert run.code == 0, run.err
    found = {
        one["metadata"]["name"].lower(): tags(one["download_info"]["url"])
        for one in json.loads((tmp_path / "report.json").read_text())["install"]
    }
    assert {"numpy", "tokenizers", "safetensors", "pillow"} <= found.keys()
    assert [name for name, tag in found.items() if not (tag == "any" or tag.endswith("aarch64"))] == []
    assert not {"torch", "diffusers", "transformers"} & found.keys()
    # and a machine that nobody has wheels for is told from it
    assert resolve(extra, ("manylinux_2_28_vax",), tmp_path).code != 0


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A real environment with the extra `runtime`, made by pip from this checkout; its Python."""
    folder = tmp_path_factory.mktemp("light")
    made = python("-m", "venv", folder / "environment", folder=folder, PYTHONPATH="")
    assert made.code == 0, made.err
    own, sources = str(folder / "environment" / "bin" / "python"), folder / "sources"
    shutil.copytree(ROOT / "fluxkiln", sources / "fluxkiln", ignore=shutil.ignore_patterns("__pycache__", "*.nb?"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)

    def install(extra: str) -> str:
        pip = ("-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", f"{sources}[{extra}]")
        installed = python(*pip, folder=folder, executable=own, PYTHONPATH="")
        assert installed.code == 0, installed.err
        return own

    install("runtime")
    return install


@pytest.mark.thorough
def test_an_environment_of_a_board(environment, bundle, tmp_path, monkeypatch):
    """What docs/your-board.md says of it: small, and `inspect`, `verify`, `pull`, `ls` and `compile --resume` work."""
    own = environment("runtime")
    packages = next(Path(own).parent.parent.glob("lib/python*/site-packages"))
    assert [name for name in (*ABSENT, "onnx", "onnxruntime") if (packages / name).exists()] == []
    assert (packages / "fluxkiln").is_dir()
    counted = [path.stat().st_size for path in packages.rglob("*") if path.is_file()]
    assert sum(counted) / 1e6 <= MOST_MEGABYTES

    def light(*arguments: object) -> Run:
        return python("-m", "fluxkiln", *arguments, folder=tmp_path, executable=own, PYTHONPATH="")

    given = ("build", "trn1", "--model", "tiny-dev", "--no-verify", "--build-dir", "b", "--json")
    other = python("-m", "fluxkiln", *given, folder=tmp_path)
    assert other.code == 5, other.err
    modules = Path(other.document["bundle"])
    published = python("-m", "fluxkiln", "publish", modules, "oci-layout:registry:made", folder=tmp_path)
    assert published.code == 0, published.err
    install_stub(tmp_path, monkeypatch)
    for command in (
        ("ls", "oci-layout:registry"), ("pull", "oci-layout:registry:made", "pulled"), ("inspect", "pulled"),
        ("verify", "pulled"), ("compile", "--resume", "pulled"), ("verify", "pulled"), ("doctor",), ("--help",),
    ):  # fmt: skip
        run = light(*command)
        assert run.code == 0, (command, run.err)
    assert {path.suffix for path in (tmp_path / "pulled" / "bundle" / "neff").iterdir()} >= {".neff"}
    # a bundle of cpu takes the other extra, which is named
    for command in (("inspect", bundle), ("generate", "--bundle", bundle, "a kiln")):
        run = light(*command)
        assert run.code == 5
        assert "onnx is not installed, and this command needs it: pip install 'fluxkiln[ort]'" in run.err


@pytest.mark.thorough
def test_an_image_in_an_environment_without_torch(environment, bundle, tmp_path):
    own = environment("ort")
    light = python("-m", "fluxkiln", *image(bundle, "light.png"), folder=tmp_path, executable=own, PYTHONPATH="")
    assert light.code == 0, light.err
    whole = python("-m", "fluxkiln", *image(bundle, "whole.png"), folder=tmp_path)
    assert whole.code == 0, whole.err
    assert (tmp_path / "light.png").read_bytes() == (tmp_path / "whole.png").read_bytes()
