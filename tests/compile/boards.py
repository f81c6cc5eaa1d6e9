"""Doubles of the device libraries' documented interfaces. They compute nothing real: they check calls and bits."""

from __future__ import annotations

import enum
import threading
from types import SimpleNamespace

import ml_dtypes
import numpy as np

# --- sophon-sail


class Dtype(enum.Enum):
    BM_FLOAT32 = 0
    BM_FLOAT16 = 1
    BM_INT32 = 6
    BM_UINT32 = 7
    BM_BFLOAT16 = 8


_HOST = {Dtype.BM_FLOAT32: np.float32, Dtype.BM_FLOAT16: np.uint16, Dtype.BM_BFLOAT16: np.uint16}
_HOST |= {Dtype.BM_INT32: np.int32, Dtype.BM_UINT32: np.uint32}


class SailTensor:
    """System and device memory apart: what is not synchronised does not arrive."""

    def __init__(self, handle, shape, dtype, own_sys_data, own_dev_data):
        assert own_sys_data
        assert own_dev_data
        self.handle, self.data_type = handle, dtype
        self.system, self.device = (np.zeros(shape, _HOST[dtype]) for _ in range(2))

    def update_data(self, array):
        assert array.dtype == self.system.dtype, "update_data takes the tensor's own type"
        self.system[...] = array

    def sync_s2d(self):
        self.device[...] = self.system

    def sync_d2s(self):
        self.system[...] = self.device

    def asnumpy(self):
        return self.system.copy()


def sail(graphs, devices=1):
    """A `sophon.sail` whose engines run `graphs`: file -> graph -> (inputs, outputs, function of arrays)."""
    loaded, places, resident = [], {}, []

    class Engine:
        def __init__(self, handle):
            self.file, self.handle = "", handle

        def __del__(self):
            if self.file in resident:
                resident.remove(self.file)

        def load(self, path):
            self.file = path.rsplit("/", 1)[-1]
            loaded.append(self.file)
            resident.append(self.file)
            places[self.file] = self.handle
            return self.file in graphs

        def get_input_names(self, graph):
            return list(graphs[self.file][graph][0])

        def get_output_names(self, graph):
            return list(graphs[self.file][graph][1])

        def process(self, graph, inputs, outputs):
            names, made, work = graphs[self.file][graph]
            if set(inputs) != set(names) or set(outputs) != set(made):
                raise RuntimeError(f"{graph} has inputs {names} and outputs {made}")
            assert {tensor.handle for tensor in (*inputs.values(), *outputs.values())} == {self.handle}
            for name, array in zip(made, work(*(inputs[name].device for name in names)), strict=True):
                outputs[name].device[...] = array

    return SimpleNamespace(
        Dtype=Dtype, Tensor=SailTensor, Engine=Engine, Handle=lambda device: device, loaded=loaded,
        places=places, resident=resident, get_available_tpu_num=lambda: devices, __version__="of a test",
    )  # fmt: skip


# --- nrtpy


class NrtpyTensor:
    def __init__(self, array, core_id):
        self.array, self.core_id = array, core_id

    @classmethod
    def from_numpy(cls, array, name=None, core_id=0):
        assert array.dtype != ml_dtypes.bfloat16, "bits only: numpy itself has no bfloat16"
        return cls(np.ascontiguousarray(array), core_id)

    def numpy(self):
        # as documented: libnrt does not always say the type
        return self.array.view(f"V{self.array.dtype.itemsize}")


def nrtpy(run, modules, numbered=True):
    """An `nrtpy` whose models call `run(module, rank, arrays)`; ranks of a model wait for one another.

    Args:
        modules: name -> (parameter sizes, output sizes, parameter names).
    """
    barriers: dict[str, threading.Barrier] = {}
    loads: list[tuple[str, int, int, bool]] = []
    calls: list[str] = []

    class NrtpyModel:
        def __init__(self, name, core, world):
            self.name, self.core, self.world = name, core, world
            inputs, outputs, names = modules[name]
            own = [f"input{i}" for i in range(len(inputs))] if numbered else names
            # not in order: a dict of a C++ map is sorted by text
            self.input_tensors_info = dict(
                sorted((n, SimpleNamespace(size=s)) for n, s in zip(own, inputs, strict=True))
            )
            self.output_tensors_info = {f"output{i}": SimpleNamespace(size=s) for i, s in enumerate(outputs)}
            self.order = own

        @classmethod
        def load_from_neff(cls, path, name=None, core_id=0, cc_enabled=False, rank_id=0, world_size=1):
            loads.append((name, rank_id, world_size, cc_enabled))
            barriers.setdefault(name, threading.Barrier(world_size, timeout=20))
            assert core_id == rank_id
            return cls(name, core_id, world_size)

        def __call__(self, inputs):
            assert set(inputs) == set(self.input_tensors_info), "keys must match the NEFF's input names"
            assert all(tensor.core_id == self.core for tensor in inputs.values()), "a tensor of another core"
            barriers[self.name].wait()  # a collective: nobody ends before all have begun
            made = run(self.name, self.core, [inputs[name].array for name in self.order])
            return {f"output{i}": NrtpyTensor(array, self.core) for i, array in enumerate(made)}

    def configure(visible_cores=None):
        calls.append(f"configure {list(visible_cores)}")

    return SimpleNamespace(
        NrtpyModel=NrtpyModel, NrtpyTensor=NrtpyTensor, configure=configure, reset=lambda: calls.append("reset"),
        loads=loads, calls=calls, __version__="of a test",
    )  # fmt: skip
