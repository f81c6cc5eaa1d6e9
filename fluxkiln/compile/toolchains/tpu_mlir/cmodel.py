"""Executor `cmodel`: bmodels on TPU-MLIR's simulator of the chip. Exact and slow: for tiny models.

It runs the bundles that are opened, and the top rung of verification.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.compile.bundle import Bundle
from fluxkiln.compile.executor import Net, check_inputs, find_net, require_file
from fluxkiln.compile.toolchains.tpu_mlir import environment
from fluxkiln.errors import ToolchainError, UsageError
from fluxkiln.patches.model import WeightUse
from fluxkiln.quantize.schemes import Scheme, parse_scheme

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fluxkiln.compile.toolchains.tpu_mlir.environment import TpuMlirEnv
    from fluxkiln.compile.toolchains.tpu_mlir.simulator import Simulator

# what the simulator makes in a second, and how many multiplications a step may have: five minutes
SPEED = 5e7
MOST_MULTIPLICATIONS = 15e9
# what every net takes besides, however small
NET_SECONDS = 2.5


def open_cmodel(bundle: Bundle) -> CmodelExecutor:
    """The simulator on a bundle.

    Raises:
        ToolchainError: TPU-MLIR is missing. UsageError: a file is, or a step would take more than five minutes.
    """
    schemes = {entry.kind: parse_scheme(entry.scheme) for entry in bundle.manifest.parts}
    shapes = bundle.manifest.shapes
    nets = bundle.nets
    work = count_costliest(nets, bundle.model.weight_uses(shapes), schemes)
    if work > MOST_MULTIPLICATIONS:
        raise UsageError(
            f"the simulator makes about {SPEED:.0e} multiplications a second, and the costliest component of this "
            f"bundle has about {work:.1e} at {shapes.width}x{shapes.height}: {work / SPEED / 60:.0f} minutes for each "
            f"step, at most {MOST_MULTIPLICATIONS / SPEED / 60:.0f} are accepted; use --executor sail on a board, or a "
            "smaller bundle"
        )
    env = environment.installed()
    if env is None:
        raise ToolchainError(
            f"executor cmodel needs TPU-MLIR, which is not in {environment.default_tpu_mlir_root()}; run `make "
            "env-tpu-mlir`"
        )
    return CmodelExecutor(nets, env, bundle.target.chip, work)


class CmodelExecutor:
    """Runs nets in one simulator process; nothing stays on the simulated device between files.

    Args:
        work: of an image step, as `count_costliest`.
        log: where what the simulator prints is kept.
    """

    name = "cmodel"

    def __init__(
        self, nets: Mapping[str, Net], env: TpuMlirEnv, chip: str, work: float = 0.0, log: Path | None = None
    ) -> None:
        for net in nets.values():
            require_file(net)
        self.nets, self.chip = dict(nets), chip
        self.step_seconds = work / SPEED + NET_SECONDS * sum(net.kind.each_step for net in nets.values())
        self._env, self._log = env, log
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

            log = self._log
            if log is None:
                self._scratch = tempfile.TemporaryDirectory(prefix="fluxkiln-cmodel-")
                log = Path(self._scratch.name) / "simulator.log"
            self._simulator = Simulator(self._env, self.chip, log)
        return self._simulator


def count_costliest(nets: Mapping[str, Net], uses: Mapping[str, WeightUse], schemes: Mapping[str, Scheme]) -> float:
    """About how many multiplications the costliest component takes, of the transformer one step.

    Every stored weight is used as often as the model says.

    Args:
        schemes: of each kind.
    """
    totals: dict[str, float] = {}
    for net in nets.values():
        use = uses.get(net.component)
        if use is None or (use.idle and net.kind.own[0] in use.idle) or net.kind.rows:
            continue
        weights = net.size / schemes[net.kind.name].bytes_per_weight
        totals[net.component] = totals.get(net.component, 0.0) + weights * use.times
    return max(totals.values(), default=0.0)
