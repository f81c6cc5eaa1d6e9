"""MLX and mflux in an environment of their own: the clients that MLX files are proven with.

Builds do not need it. Run as a module by any Python >= 3.11, with no package installed, it makes the environment.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fluxkiln.compile.environment import Environment, Tell
from fluxkiln.errors import ToolchainError

MLX_VERSION = "0.32.4"
MLX_ROOT_VARIABLE = "FLUXKILN_MLX"
_HERE = Path(__file__).resolve().parent


def mlx_environment() -> Environment:
    """How the environment of MLX and mflux is found and made."""
    return Environment(
        title=f"MLX {MLX_VERSION}",
        folder=".venv-mlx",
        cached=f"mlx-{MLX_VERSION}",
        variable=MLX_ROOT_VARIABLE,
        needed_bytes=800_000_000,
        pins=_HERE / "constraints.txt",
        python=lambda: Path(sys.executable),
        finish=_finish,
    )


def _finish(root: Path, tell: Tell) -> Mapping[str, Any]:
    """Load both."""
    tell(f"MLX {MLX_VERSION}: loading what was installed")
    code = "import mlx.core, mflux.models.flux.variants.txt2img.flux; print(mlx.core.default_device())"
    mlx_environment().run(
        [str(root / "bin" / "python"), "-c", code], root / "install.log", root, _clean(), "it could not be loaded"
    )
    return {"mlx": MLX_VERSION}


def _clean() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def run_mlx(argv: list[str], log: Path, script: Path = _HERE / "client.py") -> None:
    """Run a script in the environment, the client of this folder, its output in `log`.

    Raises:
        ToolchainError: there is no such environment, or the script failed.
    """
    env = mlx_environment()
    if env.find() is None:
        raise ToolchainError(
            f"{env.title} is not installed in {env.root}; make env-mlx makes it, or {MLX_ROOT_VARIABLE} names one"
        )
    env.run(
        [str(env.root / "bin" / "python"), str(script), *argv], log, log.parent, _clean(), "it could not use the files"
    )


def main() -> int:
    """Make the environment; progress and errors go to stderr."""
    return mlx_environment().main()


if __name__ == "__main__":
    sys.exit(main())
