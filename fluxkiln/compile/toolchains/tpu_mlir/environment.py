"""TPU-MLIR's own Python 3.10 environment: where it lies, how it is made, how its tools are started.

The main environment never imports the compiler and the compiler never sees the main environment. What TPU-MLIR needs
put right is put right here and inside that environment only: the glibc that its wheel bundles is removed when the
host's is another, and `stubs/` stands in for modules that its ONNX route imports without using. The last step
of making it is to compile one matmul and run that on the simulator.

Run as a module by any Python >= 3.11, with no package installed, it makes the environment.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxkiln.compile.environment import Environment, Tell
from fluxkiln.compile.toolchains.tpu_mlir.python310 import find_python310
from fluxkiln.errors import ToolchainError

TPU_MLIR_VERSION = "1.30.2"
TPU_MLIR_ROOT_VARIABLE = "FLUXKILN_TPU_MLIR"

_HERE = Path(__file__).resolve().parent
_LOCK_FILE = _HERE / "constraints.txt"
_STUBS = _HERE / "stubs"
_CHECK = _HERE / "check.py"
_PACKAGE = Path("lib/python3.10/site-packages/tpu_mlir")
_BUNDLED_GLIBC = ("libc.so.6", "libm.so.6", "libpthread.so.0")
_SIMULATOR = "libcmodel.so"
_NATIVE_TOOLS = ("model_tool", "tpuc-opt", "tpuc-tool")
_NEEDED_BYTES = 2_500_000_000
_CHECK_CHIP = "bm1684x"
_LAYOUT = 2  # raised when what is done to the environment after the install changes
_CHECK_REL_L2 = 1e-5


@dataclass(frozen=True, slots=True)
class TpuMlirEnv:
    """A finished environment.

    `python` is its interpreter, `package_root` the installed `tpu_mlir` folder, `stub` what compiler processes get on
    PYTHONPATH first, `simulators` a folder per chip with that chip's `libcmodel.so`, `check_rel_l2` the error of the
    self-check's matmul.
    """

    python: Path
    package_root: Path
    version: str
    stub: Path
    simulators: Path
    check_rel_l2: float


def tpu_mlir_environment() -> Environment:
    """How TPU-MLIR's environment is found and made."""
    return Environment(
        title=f"TPU-MLIR {TPU_MLIR_VERSION}",
        folder=".venv-tpu-mlir",
        cached=f"tpu-mlir-{TPU_MLIR_VERSION}",
        variable=TPU_MLIR_ROOT_VARIABLE,
        needed_bytes=_NEEDED_BYTES,
        pins=_LOCK_FILE,
        python=find_python310,
        finish=_finish,
        sources=(_CHECK, *sorted(_STUBS.rglob("*.py"))),
        layout=_LAYOUT,
    )


def default_tpu_mlir_root() -> Path:
    """FLUXKILN_TPU_MLIR, else `.venv-tpu-mlir` of the source checkout, else a folder of the user's cache."""
    return tpu_mlir_environment().root


def installed() -> TpuMlirEnv | None:
    """TPU-MLIR's finished environment of this machine, or None: then moulds of the store must do."""
    return find_tpu_mlir(default_tpu_mlir_root())


def find_tpu_mlir(root: Path) -> TpuMlirEnv | None:
    """The environment in `root` when it is finished and current; None otherwise. Starts nothing."""
    stamp = tpu_mlir_environment().find(root)
    try:
        return None if stamp is None else _describe(root, float(stamp["check"]["rel_l2"]))
    except (ValueError, KeyError, TypeError):
        return None


def ensure_tpu_mlir(root: Path, progress: Tell) -> TpuMlirEnv:
    """The environment in `root`, made first when it is missing, unfinished or of another version.

    Raises:
        ToolchainError: no Python 3.10, a platform without wheels, a failed install, or a failed self-check.
        ResourceError: too little disk.
    """
    root = root.absolute()
    env = find_tpu_mlir(root)
    if env is not None:
        return env
    _check_platform()
    stamp = tpu_mlir_environment().ensure(progress, root)
    return _describe(root, float(stamp["check"]["rel_l2"]))


def _check_platform() -> None:
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise ToolchainError(
            f"TPU-MLIR runs on linux x86_64 only, this is {sys.platform} {platform.machine()}; use another machine or "
            "the cpu target"
        )


def tool_argv(env: TpuMlirEnv, tool: str) -> list[str]:
    """The start of a command line for a tool such as `model_transform`, `model_deploy`, `model_runner`, `model_tool`.

    The scripts are run as files: the installed console commands start a second interpreter for the same (0.15 s more).

    Raises:
        ToolchainError: the environment has no such tool.
    """
    native = env.package_root / "bin" / tool
    script = env.package_root / "python" / "tools" / f"{tool}.py"
    if tool in _NATIVE_TOOLS and native.is_file():
        return [str(native)]
    if script.is_file():
        return [str(env.python), str(script)]
    raise ToolchainError(f"TPU-MLIR {env.version} in {env.package_root} has no tool {tool!r}")


def tpu_mlir_environ(env: TpuMlirEnv, chip: str = "bm1684x", base: Mapping[str, str] | None = None) -> dict[str, str]:
    """The process environment for tools, as `tpu_mlir/__init__.py` sets it up, without the caller's Python settings.

    Args:
        chip: whose simulator the process gets. TPU-MLIR itself re-points one link inside its installation at the chip
            that ran last, so two chips at once, or one after the other, would get one another's.
        base: what to start from; `os.environ` by default.

    Raises:
        ToolchainError: there is no simulator for `chip`.
    """
    simulator = env.simulators / chip
    if not (simulator / _SIMULATOR).exists():
        known = sorted(path.parent.name for path in env.simulators.glob(f"*/{_SIMULATOR}"))
        raise ToolchainError(f"TPU-MLIR {env.version} has no simulator for chip {chip!r}; it has {', '.join(known)}")
    package = env.package_root
    ppl = package / "cross_toolchains" / "ppl_compile"
    inherited = os.environ if base is None else base
    kept = {
        name: value
        for name, value in inherited.items()
        if not name.startswith(("PYTHON", "CONDA_", "VIRTUAL_ENV")) and name != "LD_PRELOAD"
    }
    # The tools start one another by `#!/usr/bin/env python3`: this environment's must come first.
    path = [env.python.parent, package / "bin", package / "python" / "tools"]
    libraries = [simulator, package / "lib", package / "lib" / "capi", package / "lib" / "third_party"]
    # a BM1684X2 has a runtime of its own, under the name that all programs load
    runtime = package / "lib" / f"libbmlib_{chip}.so.0"
    modules = [env.stub, package, package / "python", package / "customlayer" / "python"]
    return {
        **kept,
        "PATH": _join(path, kept.get("PATH", os.defpath)),
        "LD_LIBRARY_PATH": _join(libraries, kept.get("LD_LIBRARY_PATH", "")),
        **({"LD_PRELOAD": str(runtime)} if chip != _CHECK_CHIP and runtime.exists() else {}),
        "PYTHONPATH": _join(modules, ""),
        "PYTHONNOUSERSITE": "1",
        "OMP_NUM_THREADS": kept.get("OMP_NUM_THREADS", str(min(4, os.cpu_count() or 1))),
        "TPUC_ROOT": str(package),
        "PPL_PROJECT_ROOT": str(ppl),
        "PPL_BUILD_PATH": str(package / "build" / "ppl"),
        "PPL_RUNTIME_PATH": str(ppl / "deps"),
        "TPUKERNEL_CUSTOM_FIRMWARE_PATH": str(package / "lib" / "libcmodel_custom.so"),
        "CUSTOM_LAYER_UNITTEST_DIR": str(package / "customlayer" / "test_if" / "unittest"),
    }


def bundled_glibc(package_root: Path) -> str | None:
    """Version of the C library that the wheel brought along (`2.35`), or None when there is none."""
    library = package_root / "lib" / "third_party" / _BUNDLED_GLIBC[0]
    if not library.is_file():
        return None
    match = re.search(rb"GNU C Library [^\n]*?release version (\d+\.\d+)", library.read_bytes())
    return match[1].decode() if match else "unknown"


def remove_bundled_glibc(package_root: Path, host: str) -> tuple[str, ...]:
    """Remove the wheel's C library files unless the host's version is the same; return the names removed.

    The wheel's library folder comes first on LD_LIBRARY_PATH, and a C library that does not belong to the running
    loader aborts every process (`GLIBC_2.36 not found`, `stack smashing detected`).
    """
    bundled = bundled_glibc(package_root)
    if bundled is None or bundled == host:
        return ()
    removed = []
    for name in _BUNDLED_GLIBC:
        library = package_root / "lib" / "third_party" / name
        if library.exists():
            library.unlink()
            removed.append(name)
    return tuple(removed)


def _finish(root: Path, tell: Tell) -> Mapping[str, Any]:
    """Make the installed wheel usable here, and have it compile and run something."""
    host = (os.confstr("CS_GNU_LIBC_VERSION") or "").removeprefix("glibc ")
    bundled = bundled_glibc(root / _PACKAGE)
    removed = remove_bundled_glibc(root / _PACKAGE, host)
    _link_simulators(root)
    tell(f"TPU-MLIR {TPU_MLIR_VERSION}: self-check, one matmul compiled and run on the simulator")
    check = check_tpu_mlir(_describe(root, float("nan")), root / "self-check")
    tell(f"TPU-MLIR {TPU_MLIR_VERSION}: self-check relative L2 {check['rel_l2']:.1e}")
    glibc = {"host": host, "bundled": bundled, "removed": list(removed)}
    return {"tpu_mlir": TPU_MLIR_VERSION, "glibc": glibc, "check": check}


def _describe(root: Path, check_rel_l2: float) -> TpuMlirEnv:
    python, simulators = root / "bin" / "python", root / "simulators"
    return TpuMlirEnv(python, root / _PACKAGE, TPU_MLIR_VERSION, _STUBS, simulators, check_rel_l2)


def _link_simulators(root: Path) -> None:
    """Give every chip a folder in which its simulator has the name that the runtime loads, `libcmodel.so`."""
    for library in (root / _PACKAGE / "lib").glob("libcmodel_*.so"):
        folder = root / "simulators" / library.stem.removeprefix("libcmodel_")
        folder.mkdir(parents=True)
        (folder / _SIMULATOR).symlink_to(os.path.relpath(library, folder))


def check_tpu_mlir(env: TpuMlirEnv, work: Path) -> dict[str, float]:
    """Compile one matmul for BM1684X in F32 in the new folder `work` and run it on the simulator.

    Returns:
        `rel_l2` and `max_abs` of the simulator's output against numpy in float64.

    Raises:
        ToolchainError: a tool fails, or the relative L2 is above 1e-5.
    """
    work.mkdir(parents=True)
    result = work / "result.json"
    argv = [str(env.python), str(_CHECK), _CHECK_CHIP, str(result)]
    for tool in ("model_transform", "model_deploy"):
        argv += ["--", *tool_argv(env, tool)]
    tpu_mlir_environment().run(
        argv,
        work / "check.log",
        work,
        tpu_mlir_environ(env, _CHECK_CHIP),
        "its self-check could not compile and run one matmul",
    )
    numbers: dict[str, float] = json.loads(result.read_text(encoding="utf-8"))
    if not numbers["rel_l2"] <= _CHECK_REL_L2:
        raise ToolchainError(
            f"TPU-MLIR {env.version} computes one F32 matmul with a relative L2 error of {numbers['rel_l2']:.1e}, at "
            f"most {_CHECK_REL_L2:.0e} is right; see {work / 'check.log'}, and delete {env.python.parent.parent} to "
            "have it made again"
        )
    return numbers


def _join(folders: list[Path], rest: str) -> str:
    return os.pathsep.join([*map(str, folders), *([rest] if rest else [])])


def main() -> int:
    """Make the default environment; progress and errors go to stderr."""
    try:
        _check_platform()
    except ToolchainError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return tpu_mlir_environment().main()


if __name__ == "__main__":
    sys.exit(main())
