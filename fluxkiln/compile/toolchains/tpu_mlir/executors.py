"""What runs compiled parts: TPU-MLIR's simulator and interpreter off the device, and the executors of its bundles."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fluxkiln.compile.bundle import Bundle
from fluxkiln.compile.executor import (
    BITS16,
    Net,
    check_inputs,
    find_net,
    from_bits16,
    load_runtime,
    require_file,
    to_bits16,
)
from fluxkiln.compile.process import Worker
from fluxkiln.compile.toolchains.tpu_mlir import environment
from fluxkiln.compile.toolchains.tpu_mlir.devices import device_of
from fluxkiln.compile.toolchains.tpu_mlir.environment import TpuMlirEnv, tpu_mlir_environ
from fluxkiln.errors import CompileError, ResourceError, ToolchainError, UsageError
from fluxkiln.patches.model import WeightUse
from fluxkiln.quantize.schemes import Scheme, parse_scheme
from fluxkiln.types import TensorSpec

_WORKER = Path(__file__).with_name("simulator_worker.py")
# what the simulator makes in a second, and how many multiplications a step may have: five minutes
SPEED = 5e7
MOST_MULTIPLICATIONS = 15e9
# what every net takes besides, however small
NET_SECONDS = 2.5
# the manifest's word for a dtype -> sail.Dtype's name, and numpy's
DTYPES: Mapping[str, tuple[str, str]] = {
    "float32": ("BM_FLOAT32", "float32"),
    "bfloat16": ("BM_BFLOAT16", "uint16"),
    "float16": ("BM_FLOAT16", "uint16"),
    "int32": ("BM_INT32", "int32"),
}


class Simulator(Worker):
    """A long-lived process of TPU-MLIR's environment that runs nets one at a time, with the simulator of `chip`.

    What the libraries print goes to `log`, or to a file that goes with the process.
    """

    def __init__(self, env: TpuMlirEnv, chip: str, log: Path | None) -> None:
        super().__init__([str(env.python), str(_WORKER)], tpu_mlir_environ(env, chip), "simulator", log)

    def run(
        self, file: Path, inputs: Mapping[str, NDArray[Any]], outputs: tuple[str, ...], net: str = ""
    ) -> dict[str, NDArray[Any]]:
        """Run one net.

        Args:
            file: a `.bmodel` (simulator) or a `*_tpu.mlir` beside its weight file (interpreter).
            inputs: by the net's input names, float32 or integer.
            outputs: what to call its outputs, in order.
            net: which net of a combined bmodel; the first by default.

        Raises:
            CompileError: the net does not exist, or the run failed. ResourceError: the process was killed.
        """
        made = self.look(file, inputs, (), net).values()
        if len(made) != len(outputs):
            raise CompileError(f"{file.name} {net} has {len(made)} outputs, {len(outputs)} are expected")
        return dict(zip(outputs, made, strict=True))

    def look(
        self, file: Path, inputs: Mapping[str, NDArray[Any]], values: tuple[str, ...], net: str = ""
    ) -> dict[str, NDArray[Any]]:
        """Values on the way through a lowered graph, or all outputs, by its own names, float32; raises as `run`."""
        arrays: dict[str, Any] = dict(inputs)
        np.savez(self.folder / "in.npz", **arrays)
        request = {"file": str(file.absolute()), "net": net, "inputs": "in.npz", "outputs": "out.npz", "values": values}
        answer = self.request(request)
        if isinstance(answer, int):
            raise ResourceError(
                f"simulating {file.name} {net}: the process ended with code {answer} (-9: killed for memory); "
                f"log: {self.log}"
            )
        if not answer["ok"]:
            raise CompileError(f"simulating {file.name} {net} failed: {answer['error']}; log: {self.log}")
        with np.load(self.folder / "out.npz") as results:
            return {name: results[name] for name in results.files}


def open_cmodel(bundle: Bundle) -> CmodelExecutor:
    """The simulator on a bundle; ToolchainError without TPU-MLIR, UsageError for a step of more than five minutes."""
    nets, uses = bundle.nets, bundle.model.weight_uses
    schemes = {entry.kind: parse_scheme(entry.scheme) for entry in bundle.manifest.parts}
    work, shapes = max((count_costliest(bundle.at(one).nets, uses(one), schemes), one) for one in bundle.sizes)
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
    """Executor `cmodel`: nets on the simulator, exact and slow: for tiny models; the top rung of verification too.

    Nothing stays on the simulated device between files.

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

    @property
    def facts(self) -> Mapping[str, str]:
        return {"runtime": f"TPU-MLIR {self._env.version}", "device": f"simulator of {self.chip}, no hardware"}

    def _open(self) -> Simulator:
        if self._simulator is None:
            self._simulator = Simulator(self._env, self.chip, self._log)
        return self._simulator


def count_costliest(nets: Mapping[str, Net], uses: Mapping[str, WeightUse], schemes: Mapping[str, Scheme]) -> float:
    """About how many multiplications the costliest component takes, of the transformer one step.

    Every stored weight is used as often as the model says. `schemes` are those of each kind.
    """
    totals: dict[str, float] = defaultdict(float)
    for net in nets.values():
        use = uses.get(net.component)
        if use is None or (use.idle and net.kind.own[0] in use.idle) or net.kind.rows:
            continue
        weights = net.size / schemes[net.kind.name].bytes_per_weight
        totals[net.component] += weights * use.times
    return max(totals.values(), default=0.0)


class SailExecutor:
    """Executor `sail`: nets on a BM1684X board, through Sophgo's SAIL.

    A bmodel is loaded when one of its nets is first run, whole, as SAIL does it. A transformer in several files is on
    as many chips, which take their turns; what goes from one to the next goes through the host, as between all nets.

    Written from the public documentation and not run here, where there is no board. What is used of it:
        sail.get_available_tpu_num() -> int
        sail.Handle(tpu_id); sail.Engine(handle); engine.load(path) -> bool; engine.get_graph_names() -> list
        sail.Tensor(handle, shape, dtype, own_sys_data, own_dev_data); tensor.update_data(array); tensor.sync_s2d();
        tensor.sync_d2s(); tensor.asnumpy()
        engine.process(graph_name, {input: Tensor}, {output: Tensor})

    Args:
        device: number of the first device, as `bm-smi` lists them; a bundle for several takes those that follow.

    Raises:
        UsageError: no number. ToolchainError: the library is not installed, or it finds fewer devices.

    Source: https://github.com/sophgo/sophon-sail, docs/source_en/module_python/sail.Engine.rst, sail.Tensor.rst (16-bit
    values are passed as the uint16 of their bits), docs/source_zh/module_python/0_enum_type/sail.Dtype.rst.
    """

    name = "sail"

    def __init__(self, nets: Mapping[str, Net], device: int | str = 0) -> None:
        if isinstance(device, str):
            raise UsageError(f"--device {device}: boards have numbers, as `bm-smi` lists them; 0 is the first")
        for net in nets.values():
            require_file(net)
        self._sail = load_runtime(
            "sophon.sail",
            "executor sail needs Sophgo's sophon-sail on a machine with a BM1684X",
            "install the wheel of your SDK, or use --executor cmodel for a tiny bundle",
        )
        count = int(self._sail.get_available_tpu_num())
        chips = 1 + max(device_of(net.file.name) for net in nets.values())
        if device + chips > count:
            several = f"the bundle takes {chips} chips, {device} to {device + chips - 1}" * (chips > 1)
            raise ToolchainError(
                f"{several or f'device {device}'}: sophon-sail sees {count} devices; check `bm-smi` and the driver, or "
                "use --executor cmodel for a tiny bundle"
            )
        self.nets = dict(nets)
        self.device, self.chips = device, chips
        self._handles = [self._sail.Handle(number) for number in range(device, device + chips)]
        self._dropped: set[str] = set()
        self._engines: dict[Path, Any] = {}

    def __call__(self, part: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        net = find_net(self.nets, part)
        check_inputs(net, inputs)
        engine = self._engine(net)
        handle = self._handle(net)
        given = {spec.name: self._given(handle, spec, inputs[spec.name]) for spec in net.inputs}
        made = {spec.name: self._tensor(handle, spec) for spec in net.outputs}
        own_inputs, own_outputs = engine.get_input_names(net.name), engine.get_output_names(net.name)
        try:
            engine.process(
                net.name,
                # a net's own input names may differ from the kind's; their order does not
                given if set(own_inputs) == set(given) else dict(zip(own_inputs, given.values(), strict=True)),
                dict(zip(own_outputs, made.values(), strict=True)),
            )
        except RuntimeError as error:
            raise CompileError(f"sophon-sail could not run part {part}: {error}; see dmesg and bm-smi") from error
        results = {}
        for spec in net.outputs:
            made[spec.name].sync_d2s()
            values = made[spec.name].asnumpy()
            wide = from_bits16(values, spec.dtype) if spec.dtype in BITS16 else values.astype("float32")
            results[spec.name] = wide.reshape(spec.shape)
        return results

    def load(self, component: str) -> None:
        """Load a component's files; where some of its parts run once, only theirs: they go before the others come."""
        nets = [net for net in self.nets.values() if net.component == component]
        for net in [net for net in nets if net.kind.rows] or nets:
            self._engine(net)

    def release(self, component: str) -> None:
        """Free a component's files, but for those that hold nets of another one too."""
        others = {net.file for net in self.nets.values() if net.component != component}
        for file in {net.file for net in self.nets.values() if net.component == component} - others:
            self._engines.pop(file, None)

    def drop(self, part: str) -> None:
        """SAIL frees whole files: that of the part goes with the last of its parts."""
        self._dropped.add(part)
        inside = {name for name, net in self.nets.items() if net.file == self.nets[part].file}
        if inside <= self._dropped:
            self._dropped -= inside
            self._engines.pop(self.nets[part].file, None)

    def close(self) -> None:
        self._engines.clear()

    @property
    def facts(self) -> Mapping[str, str]:
        version = getattr(self._sail, "__version__", "")
        last, turns = self.device + self.chips - 1, ", one after the other: more chips hold more and are no faster"
        several = f" to {last}{turns}" * (self.chips > 1)
        return {"runtime": f"sophon-sail {version}".strip(), "device": f"BM1684X {self.device}{several}"}

    def _handle(self, net: Net) -> Any:
        """The device that a net's file is on."""
        return self._handles[device_of(net.file.name)]

    def _engine(self, net: Net) -> Any:
        if net.file not in self._engines:
            engine = self._sail.Engine(self._handle(net))
            if engine.load(str(net.file)) is False:
                number = self.device + device_of(net.file.name)
                raise ResourceError(
                    f"sophon-sail cannot load {net.file.name} on device {number}; see bm-smi for free memory, and the "
                    "device plan of `fluxkiln plan`"
                )
            self._engines[net.file] = engine
        return self._engines[net.file]

    def _given(self, handle: Any, spec: TensorSpec, array: NDArray[Any]) -> Any:
        tensor, dtype = self._tensor(handle, spec), spec.dtype
        bits = to_bits16(array, dtype) if dtype in BITS16 else np.ascontiguousarray(array, DTYPES[dtype][1])
        tensor.update_data(bits)
        tensor.sync_s2d()
        return tensor

    def _tensor(self, handle: Any, spec: TensorSpec) -> Any:
        dtype = getattr(self._sail.Dtype, DTYPES[spec.dtype][0])
        return self._sail.Tensor(handle, list(spec.shape), dtype, True, True)
