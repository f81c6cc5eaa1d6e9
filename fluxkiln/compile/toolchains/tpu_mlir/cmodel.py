"""Executor `cmodel`: the bmodels of a bundle on TPU-MLIR's simulator of the chip. Exact and slow: for tiny models."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.compile.executor import Net, check_inputs, find_net, require_file
from fluxkiln.errors import ToolchainError, UsageError
from fluxkiln.patches.model import Model, WeightUse
from fluxkiln.types import Shapes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fluxkiln.compile.toolchains.tpu_mlir.simulator import Simulator

# what the simulator makes in a second, and how many multiplications a step may have: five minutes
SPEED = 5e7
MOST_MULTIPLICATIONS = 15e9
# what every net takes besides, however small
NET_SECONDS = 2.5
_BYTES = {"W4BF16": 0.5625, "W8BF16": 1.0625, "BF16": 2.0, "F16": 2.0, "F32": 4.0}


class CmodelExecutor:
    """Runs nets in one simulator process; nothing stays on the simulated device between files.

    Args:
        schemes: part -> scheme, from which the work is estimated.

    Raises:
        ToolchainError: TPU-MLIR is missing. UsageError: a step would take more than five minutes.
    """

    name = "cmodel"

    def __init__(
        self,
        nets: Mapping[str, Net],
        chip: str,
        model: Model,
        shapes: Shapes,
        schemes: Mapping[str, str],
        most: float = MOST_MULTIPLICATIONS,
    ) -> None:
        from fluxkiln.compile.toolchains.tpu_mlir.environment import default_tpu_mlir_root, find_tpu_mlir

        for net in nets.values():
            require_file(net)
        work = count_work(nets, model.weight_uses(shapes), schemes)
        if work > most:
            raise UsageError(
                f"the simulator makes about {SPEED:.0e} multiplications a second, and the costliest component of this "
                f"bundle has about {work:.1e} at {shapes.width}x{shapes.height}: {work / SPEED / 60:.0f} minutes for "
                f"each step, at most {most / SPEED / 60:.0f} are accepted; use --executor sail on a board, or a "
                "smaller bundle"
            )
        env = find_tpu_mlir(default_tpu_mlir_root())
        if env is None:
            raise ToolchainError(
                f"executor cmodel needs TPU-MLIR, which is not in {default_tpu_mlir_root()}; run `make env-tpu-mlir`"
            )
        self.nets = dict(nets)
        self.chip = chip
        each_step = sum(net.kind.each_step for net in nets.values())
        self.step_seconds = work / SPEED + NET_SECONDS * each_step
        self._env = env
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._simulator: Simulator | None = None

    def __call__(self, part: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        net = find_net(self.nets, part)
        check_inputs(net, inputs)
        return self._open().run(net.file, inputs, tuple(spec.name for spec in net.outputs), net.name)

    def load(self, component: str) -> None:
        """Start the simulator; it loads a file when a net of it is run."""
        self._open()

    def release(self, component: str) -> None:
        """The simulator holds one file at a time as it is."""

    def drop(self, part: str) -> None:
        """As `release`."""

    def close(self) -> None:
        if self._simulator is not None:
            self._simulator.close()
            self._simulator = None
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None

    @property
    def facts(self) -> Mapping[str, str]:
        return {"runtime": f"TPU-MLIR {self._env.version}", "device": f"simulator of {self.chip}, no hardware"}

    def _open(self) -> Simulator:
        if self._simulator is None:
            from fluxkiln.compile.toolchains.tpu_mlir.simulator import Simulator

            self._scratch = tempfile.TemporaryDirectory(prefix="fluxkiln-cmodel-")
            self._simulator = Simulator(self._env, self.chip, Path(self._scratch.name) / "simulator.log")
        return self._simulator


def count_work(nets: Mapping[str, Net], uses: Mapping[str, WeightUse], schemes: Mapping[str, str]) -> float:
    """About how many multiplications the costliest component takes, of the transformer one step.

    Every stored weight is used as often as the model says.
    """
    totals: dict[str, float] = {}
    for part, net in nets.items():
        use = uses.get(net.component)
        if use is None or (use.idle and net.kind.own[0] in use.idle) or net.kind.rows:
            continue
        weights = net.size / _BYTES.get(schemes[part].split("-")[0], 2.0)
        totals[net.component] = totals.get(net.component, 0.0) + weights * use.times
    return max(totals.values(), default=0.0)
