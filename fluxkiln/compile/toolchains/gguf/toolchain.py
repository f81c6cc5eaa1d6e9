"""GGUF as a toolchain: whole components packed into files that other programs load, and those files read back."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.artifacts.actions import ActionCache
from fluxkiln.compile.bundle import Bundle
from fluxkiln.compile.executor import Executor
from fluxkiln.compile.plan import Made, Plan
from fluxkiln.compile.repacked import FileReader
from fluxkiln.compile.repacker import LOADED, LOADED_GATE, NAMED, NAMED_GATE, Repacker, part_folders, weight_gates
from fluxkiln.compile.toolchain import API, ToolStatus
from fluxkiln.compile.toolchains.gguf.file import LAYOUTS, file_name, layout_of, open_file, plan_file, write_file
from fluxkiln.errors import UsageError
from fluxkiln.export.checkpoint import Checkpoint

if TYPE_CHECKING:
    from fluxkiln.verify.ladder import Ladder

# What a format leaves of a Gaussian weight, relative to it: Q8_0 0.005, Q6_K 0.018, Q5_* 0.036 to 0.043, Q4_* 0.072 to
# 0.086. What is turned grows with its square: W4BF16 has 0.09 and 0.01, so 0.002 for 0.04 and 0.0004 for 0.018.
_TURNS: tuple[tuple[str, float, float], ...] = (
    ("Q8_0*", 0.9999, 50.0), ("Q6_K*", 0.9995, 45.0), ("Q5_*", 0.9975, 38.0), ("Q4_*", 0.99, 33.0),
)  # fmt: skip


def write_files(
    checkpoint: Checkpoint, plan: Plan, folder: str, work: Path, count: Callable[[int], None]
) -> dict[str, list[str]]:
    """See `WriteFiles`: one file."""
    write_file(checkpoint, plan, folder, work / file_name(folder), count)
    return {file_name(folder): list(checkpoint.tensors[folder])}


def read_files(checkpoint: Checkpoint, plan: Plan, folder: str, paths: Mapping[str, Path]) -> FileReader:
    """See `OpenFiles`."""
    return open_file(checkpoint, folder, paths[file_name(folder)])


class Gguf(Repacker):
    """See `compile.toolchain.Toolchain`."""

    api = API
    name = "gguf"
    unproven = "no program that loads these files ran"
    rungs = (LOADED, NAMED)
    gates = (NAMED_GATE, LOADED_GATE, *weight_gates(_TURNS))
    write = staticmethod(write_files)
    read = staticmethod(read_files)

    def tools(self, plan: Plan) -> dict[str, str]:
        return {"gguf": importlib.metadata.version("gguf")}

    def check(self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache) -> None:
        for folder in part_folders(plan):
            plan_file(checkpoint, plan, folder)

    def read_back(self, ladder: Ladder, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, made: Made) -> None:
        from fluxkiln.compile.named import compare_rows, diffusers_rows

        for folder in (folder for folder in part_folders(plan) if folder in LAYOUTS):
            if stretch := layout_of(checkpoint, folder).stretch:
                found = diffusers_rows(checkpoint, folder, plan_file(checkpoint, plan, folder), stretch)
                compare_rows(ladder, checkpoint, plan, folder, found)

    def open_executor(self, bundle: Bundle, name: str | None, options: Mapping[str, Any]) -> Executor:
        raise UsageError(
            f"{bundle.folder} has GGUF files, which other programs run: give them to stable-diffusion.cpp, ComfyUI or "
            "diffusers, as docs/targets.md shows; for an image here use a bundle for cpu"
        )

    def doctor(self) -> Sequence[ToolStatus]:
        from fluxkiln.compile.doctor import ENVIRONMENT, package_status

        return (package_status("gguf", ENVIRONMENT),)


TOOLCHAIN = Gguf()
