"""Executor `sail`: the bmodels of a bundle on a BM1684X board, through Sophgo's SAIL.

Written from the public documentation and not run here, where there is no board. What is used of it:
    sail.get_available_tpu_num() -> int
    sail.Handle(tpu_id); sail.Engine(handle); engine.load(path) -> bool; engine.get_graph_names() -> list
    sail.Tensor(handle, shape, dtype, own_sys_data, own_dev_data); tensor.update_data(array); tensor.sync_s2d();
    tensor.sync_d2s(); tensor.asnumpy()
    engine.process(graph_name, {input: Tensor}, {output: Tensor})
Source: https://github.com/sophgo/sophon-sail, docs/source_en/module_python/sail.Engine.rst, sail.Tensor.rst (16-bit
values are passed as the uint16 of their bits), docs/source_zh/module_python/0_enum_type/sail.Dtype.rst.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.compile.executor import BITS16, Net, check_inputs, find_net, from_bits16, require_file, to_bits16
from fluxkiln.errors import CompileError, ResourceError, ToolchainError

if TYPE_CHECKING:
    from numpy.typing import NDArray

# the manifest's word for a dtype -> sail.Dtype's name, and numpy's
DTYPES: Mapping[str, tuple[str, str]] = {
    "float32": ("BM_FLOAT32", "float32"),
    "bfloat16": ("BM_BFLOAT16", "uint16"),
    "float16": ("BM_FLOAT16", "uint16"),
    "int32": ("BM_INT32", "int32"),
}


class SailExecutor:
    """Runs nets on one device. A bmodel is loaded when one of its nets is first run, whole, as SAIL does it.

    Args:
        device: number of the device, as `bm-smi` lists them.

    Raises:
        ToolchainError: the library is not installed, or it finds no such device.
    """

    name = "sail"

    def __init__(self, nets: Mapping[str, Net], device: int = 0) -> None:
        for net in nets.values():
            require_file(net)
        self._sail = _import_sail()
        count = int(self._sail.get_available_tpu_num())
        if device >= count:
            raise ToolchainError(
                f"device {device}: sophon-sail sees {count} devices; check `bm-smi` and the driver, or use "
                "--executor cmodel for a tiny bundle"
            )
        self.nets = dict(nets)
        self.device = device
        self._handle = self._sail.Handle(device)
        self._engines: dict[Path, Any] = {}

    def __call__(self, part: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        net = find_net(self.nets, part)
        check_inputs(net, inputs)
        engine = self._engine(net)
        given = {spec.name: self._given(spec.shape, spec.dtype, inputs[spec.name]) for spec in net.inputs}
        made = {spec.name: self._tensor(spec.shape, spec.dtype) for spec in net.outputs}
        own_inputs, own_outputs = engine.get_input_names(net.name), engine.get_output_names(net.name)
        try:
            engine.process(
                net.name,
                dict(zip(own_inputs, self._ordered(net, given, own_inputs), strict=True)),
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
        for net in self.nets.values():
            if net.component == component:
                self._engine(net)

    def release(self, component: str) -> None:
        """Free a component's files, but for those that hold nets of another one too."""
        others = {net.file for net in self.nets.values() if net.component != component}
        for file in {net.file for net in self.nets.values() if net.component == component} - others:
            self._engines.pop(file, None)

    def drop(self, part: str) -> None:
        """SAIL loads and frees whole files."""

    def close(self) -> None:
        self._engines.clear()

    @property
    def facts(self) -> Mapping[str, str]:
        return {
            "runtime": f"sophon-sail {getattr(self._sail, '__version__', '')}".strip(),
            "device": f"BM1684X {self.device}",
        }

    def _engine(self, net: Net) -> Any:
        if net.file not in self._engines:
            engine = self._sail.Engine(self._handle)
            if engine.load(str(net.file)) is False:
                raise ResourceError(
                    f"sophon-sail cannot load {net.file.name} on device {self.device}; see bm-smi for free memory, and "
                    "the device plan of `fluxkiln plan`"
                )
            self._engines[net.file] = engine
        return self._engines[net.file]

    def _ordered(self, net: Net, given: Mapping[str, Any], own: list[str]) -> list[Any]:
        """A net's own input names may differ from the kind's; their order does not."""
        return [given[name] for name in own] if set(own) == set(given) else [given[spec.name] for spec in net.inputs]

    def _given(self, shape: tuple[int, ...], dtype: str, array: NDArray[Any]) -> Any:
        import numpy as np

        tensor = self._tensor(shape, dtype)
        bits = to_bits16(array, dtype) if dtype in BITS16 else np.ascontiguousarray(array, DTYPES[dtype][1])
        tensor.update_data(bits)
        tensor.sync_s2d()
        return tensor

    def _tensor(self, shape: tuple[int, ...], dtype: str) -> Any:
        return self._sail.Tensor(self._handle, list(shape), getattr(self._sail.Dtype, DTYPES[dtype][0]), True, True)


def _import_sail() -> Any:
    try:
        return importlib.import_module("sophon.sail")
    except ImportError as error:
        raise ToolchainError(
            f"executor sail needs Sophgo's sophon-sail on a machine with a BM1684X, and it is not here ({error}); "
            "install the wheel of your SDK, or use --executor cmodel for a tiny bundle"
        ) from error
