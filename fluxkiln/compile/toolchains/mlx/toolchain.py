"""MLX as a toolchain: whole components packed into files that mflux or MLX's example loads, and those read back."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.artifacts.actions import ActionCache
from fluxkiln.compile.bundle import Bundle
from fluxkiln.compile.executor import Executor
from fluxkiln.compile.plan import BundleFile, Made, Plan
from fluxkiln.compile.repacker import LOADED, LOADED_GATE, NAMED, NAMED_GATE, Repacker, part_folders, weight_gates
from fluxkiln.compile.toolchain import API, ToolStatus
from fluxkiln.compile.toolchains.mlx.environment import mlx_environment, run_mlx
from fluxkiln.compile.toolchains.mlx.executor import MlxExecutor
from fluxkiln.compile.toolchains.mlx.file import (
    SHARDED,
    layout_of,
    plan_file,
    read_components,
    write_components,
)
from fluxkiln.compile.toolchains.mlx.graphs import GRAPHS_FILE, write_graphs
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.progress import Laps, Progress
from fluxkiln.settings import Settings

if TYPE_CHECKING:
    from fluxkiln.compile.named import Numbers
    from fluxkiln.verify.ladder import Ladder

# Of a Gaussian weight 8 bits leave 0.0076, as biases are bfloat16, and 4 bits 0.09, as W4BF16, whose bounds these are.
# What is turned grows with the square.
_TURNS: tuple[tuple[str, float, float], ...] = (("MLX8*", 0.9998, 47.0), ("MLX4*", 0.99, 33.0))


class Mlx(Repacker):
    """See `compile.toolchain.Toolchain`."""

    api = API
    name = "mlx"
    unproven = "no program that loads these files ran"
    executors = ("mlx",)
    takes: Mapping[str, tuple[str, ...]] = {"mlx": ("device", "quantize", "no-t5-padding")}
    rungs = (LOADED, NAMED)
    gates = (NAMED_GATE, LOADED_GATE, *weight_gates(_TURNS))
    write = staticmethod(write_components)
    read = staticmethod(read_components)

    def make(
        self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, settings: Settings, progress: Progress, laps: Laps
    ) -> Made:
        made = super().make(checkpoint, plan, cache, settings, progress, laps)
        with tempfile.TemporaryDirectory() as root:
            graphs = write_graphs(checkpoint, plan, cache, Path(root) / "graphs.json")
            file = BundleFile(GRAPHS_FILE, cache.store.add_file(graphs))
        laps.lap("graphs")
        return replace(made, files=(*made.files, file))

    def check(self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache) -> None:
        for folder in part_folders(plan):
            plan_file(checkpoint, plan, folder)

    def read_back(self, ladder: Ladder, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, made: Made) -> None:
        from fluxkiln.compile.named import compare_rows, diffusers_rows

        for folder in part_folders(plan):
            found = None
            if plan.target.chip == SHARDED and mlx_environment().find():
                found = mflux_rows(checkpoint, plan, folder, made.own[folder])
            elif stretch := layout_of(checkpoint, plan.target.chip, folder).stretch:
                found = diffusers_rows(checkpoint, folder, plan_file(checkpoint, plan, folder), stretch)
            if found is not None:
                compare_rows(ladder, checkpoint, plan, folder, found)

    def open_executor(self, bundle: Bundle, name: str | None, options: Mapping[str, Any]) -> Executor:
        return MlxExecutor(bundle, options)

    def doctor(self) -> Sequence[ToolStatus]:
        env = mlx_environment()
        found = env.find() is not None
        return (
            ToolStatus(env.title, found, "", str(env.root) if found else "", "make env-mlx makes it", needed=False),
        )


def mflux_rows(checkpoint: Checkpoint, plan: Plan, folder: str, paths: Mapping[str, Path]) -> Numbers:
    """The rows of a folder's tensors that mflux finds in its files, by its own table of names and its own class.

    Raises:
        ToolchainError: mflux failed; with the end of what it said.
    """
    import numpy as np

    from fluxkiln.compile.named import file_rows, found_rows, number_rows

    numbers = number_rows(checkpoint, folder)
    names = checkpoint.model.state_names(folder, checkpoint.model.layout(folder, checkpoint.configs[folder]))
    with tempfile.TemporaryDirectory() as root:
        work = Path(root)
        for name, path in paths.items():
            (work / name).parent.mkdir(exist_ok=True)
            (work / name).symlink_to(path)
        axes = {name: (-1, *[1] * (len(checkpoint.tensors[folder][name].shape) - 1)) for name in numbers}
        given = {names[name]: rows.astype(np.int32).reshape(axes[name]) for name, rows in numbers.items()}
        np.savez(work / "numbers.npz", **given)  # type: ignore[arg-type]
        run_mlx(["names", str(work / folder), str(work / "numbers.npz"), str(work / "found.json")], work / "log")
        told = json.loads((work / "found.json").read_text(encoding="utf-8"))
    there = {name: np.asarray(rows, np.float64) for name, rows in told["rows"].items()}
    odd = {re.sub(r"\.(scales|biases)$", ".weight", name) for name in told["odd"]}
    return found_rows(numbers, file_rows(numbers, plan_file(checkpoint, plan, folder)), there, odd)


TOOLCHAIN = Mlx()
