"""stable-diffusion.cpp in an environment of its own, built from source: a client that GGUF files are proven with.

Builds do not need it. Run as a module by any Python >= 3.11, with no package installed, it makes the environment.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fluxkiln.compile.environment import Environment, Tell
from fluxkiln.errors import ToolchainError, UsageError

SD_CPP_VERSION = "0.4.7"
SD_CPP_ROOT_VARIABLE = "FLUXKILN_SD_CPP"
_HERE = Path(__file__).resolve().parent
# tensor of the transformer -> columns that are fixed in stable-diffusion.cpp, and what they are of
_WIDTHS = (
    ("vector_in.in_layer.weight", 768, "a pooled prompt"),
    ("txt_in.weight", 4096, "T5's output"),
)


def sd_cpp_environment() -> Environment:
    """How stable-diffusion.cpp's environment is found and made."""
    return Environment(
        title=f"stable-diffusion.cpp {SD_CPP_VERSION}",
        folder=".venv-sd-cpp",
        cached=f"sd-cpp-{SD_CPP_VERSION}",
        variable=SD_CPP_ROOT_VARIABLE,
        needed_bytes=1_500_000_000,
        pins=_HERE / "constraints.txt",
        python=_find_python,
        finish=_finish,
        options=("--no-deps", "--no-binary", "stable-diffusion-cpp-python"),
    )


def _find_python() -> Path:
    """This one; ToolchainError where what it is built with is missing."""
    if missing := [name for name in ("cmake", "g++") if shutil.which(name) is None]:
        raise ToolchainError(
            f"stable-diffusion.cpp is built from source and there is no {' and no '.join(missing)} on PATH; install "
            f"Debian's {' '.join(missing)}, or leave it out: no build needs it"
        )
    return Path(sys.executable)


def _finish(root: Path, tell: Tell) -> Mapping[str, Any]:
    """Load the library."""
    code = "import stable_diffusion_cpp as sd; print(sd.sd_get_system_info().decode())"
    tell(f"stable-diffusion.cpp {SD_CPP_VERSION}: loading what was built")
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    sd_cpp_environment().run(
        [str(root / "bin" / "python"), "-c", code], root / "install.log", root, environ, "it could not be loaded"
    )
    return {"stable_diffusion_cpp": SD_CPP_VERSION}


def check_widths(transformer: Path) -> None:
    """Raise UsageError for a transformer whose widths stable-diffusion.cpp has not; IntegrityError for no GGUF file."""
    from fluxkiln.compile.toolchains.gguf.file import stored_tensors

    columns = {one.name: int(one.shape[0]) for one in stored_tensors(transformer)}
    for name, width, what in _WIDTHS:
        found = columns.get(name, 0)
        if found != width:
            raise UsageError(
                f"{transformer} takes {what} of width {found}, stable-diffusion.cpp has {width} alone; give the file "
                "to ComfyUI or diffusers, or build a model of FLUX.1's own sizes"
            )


def run_client(asked: Mapping[str, Any], image: Path, log: Path) -> None:
    """Paint an image with the client of this folder in the environment, its output in `log`.

    Args:
        asked: files and sampling, see `client.py`.

    Raises:
        ToolchainError: there is no such environment, or the client failed. UsageError: as `check_widths`.
    """
    check_widths(Path(asked["diffusion_model_path"]))
    env = sd_cpp_environment()
    if env.find() is None:
        raise ToolchainError(
            f"{env.title} is not installed in {env.root}; make env-sd-cpp builds it, or {SD_CPP_ROOT_VARIABLE} names "
            "one"
        )
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [str(env.root / "bin" / "python"), str(_HERE / "client.py"), json.dumps(asked), str(image)]
    env.run(command, log, log.parent, environ, "it could not use the files")


def main() -> int:
    """Make the environment; progress and errors go to stderr."""
    return sd_cpp_environment().main()


if __name__ == "__main__":
    sys.exit(main())
