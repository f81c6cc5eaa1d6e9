"""Executor `neuron`: the NEFFs of a split model on NeuronCores, through AWS's nrtpy.

Written from the public documentation and not run here, where there is no device. What is used of it:
    nrtpy.configure(visible_cores=[...]) before the first operation; nrtpy.reset()
    NrtpyModel.load_from_neff(path, name=, core_id=, cc_enabled=, rank_id=, world_size=)
    model.input_tensors_info, model.output_tensors_info: name -> metadata with `size` in bytes
    NrtpyTensor.from_numpy(array, name=, core_id=); tensor.numpy(), whose dtype may be void
    model(inputs={name: NrtpyTensor}) -> {name: NrtpyTensor}
    nrtpy's errors are RuntimeErrors
Source: https://awsdocs-neuron.readthedocs-hosted.com/en/latest/neuron-runtime/nrtpy/ (model, tensor, configuration,
errors; of 2026-07). One process holds one runtime with all cores; ranks that wait for one another need a thread each.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fluxkiln.compile.executor import load_runtime
from fluxkiln.compile.toolchains.neuron.modules import Module
from fluxkiln.compile.toolchains.neuron.replicas import Array, ReadWeights, dtype_of, module_arguments
from fluxkiln.compile.toolchains.neuron.split_bundle import SplitBundle, find_compiled
from fluxkiln.errors import CompileError, IntegrityError, ToolchainError
from fluxkiln.types import TensorSpec

_T = TypeVar("_T")
DEVICES = Path("/dev")


class NeuronExecutor:
    """Runs parts as all their ranks at once, rank r on core r; outputs are those of rank 0.

    A NEFF is loaded once for all parts of its module. The weights of a part are moved to its cores when it is first
    run and stay there until its component is released.

    Raises:
        ToolchainError: NEFFs, the library or the device are missing. IntegrityError: a NEFF is not this bundle's.
    """

    name = "neuron"

    def __init__(self, components: Mapping[str, str], bundle: SplitBundle, weights: ReadWeights) -> None:
        self.bundle, self.components, self.weights = bundle, dict(components), weights
        self.neffs = find_compiled(bundle)
        self._nrtpy = _import_nrtpy()
        cores = max(module.ranks for module in bundle.modules.values())
        self._nrtpy.configure(visible_cores=list(range(cores)))
        self._threads = ThreadPoolExecutor(cores, "rank")
        self._models: dict[str, list[Any]] = {}
        self._weights: dict[str, list[dict[str, Any]]] = {}

    def __call__(self, part: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        module = self.bundle.module_of(part)
        arguments = module_arguments(module, part, inputs)
        self._load(part, module)
        models, weights = self._models[module.name], self._weights[part]
        names = match_names(models[0].input_tensors_info, module.parameters, f"NEFF {module.name}")

        def run(rank: int) -> Any:
            given = {name: self._tensor(array, rank) for name, array in zip(names, arguments, strict=False)}
            return models[rank](inputs={**given, **weights[rank]})

        results = self._on_ranks(module.ranks, run, f"part {part}")[0]
        own = match_names(models[0].output_tensors_info, module.outputs, f"NEFF {module.name}")
        return {
            spec.name: _as_float32(results[name].numpy(), spec) for name, spec in zip(own, module.outputs, strict=True)
        }

    def load(self, component: str) -> None:
        for part, own in self.components.items():
            if own == component:
                self._load(part, self.bundle.module_of(part))

    def release(self, component: str) -> None:
        """Free a component's weights and the NEFFs of its modules; nrtpy frees a tensor when nobody holds it."""
        for part in [part for part, own in self.components.items() if own == component]:
            self.drop(part)
            self._models.pop(self.bundle.part_modules[part], None)

    def drop(self, part: str) -> None:
        self._weights.pop(part, None)

    def close(self) -> None:
        self._weights.clear()
        self._models.clear()
        self._threads.shutdown()
        self._nrtpy.reset()

    @property
    def facts(self) -> Mapping[str, str]:
        version = getattr(self._nrtpy, "__version__", "")
        return {
            "runtime": f"nrtpy {version}".strip(),
            "device": f"{self.bundle.instance}, {self.bundle.tp_degree} NeuronCores",
        }

    def _load(self, part: str, module: Module) -> None:
        if module.name not in self._models:
            load = self._nrtpy.NrtpyModel.load_from_neff

            def load_rank(rank: int) -> Any:
                return load(
                    self.neffs[module.name], name=module.name, core_id=rank, cc_enabled=module.ranks > 1, rank_id=rank,
                    world_size=module.ranks,
                )  # fmt: skip

            self._models[module.name] = self._on_ranks(module.ranks, load_rank, f"loading NEFF {module.name}")
        if part not in self._weights:
            model = self._models[module.name][0]
            names = match_names(model.input_tensors_info, module.parameters, f"NEFF {module.name}")
            slots = names[len(module.inputs) :]
            self._weights[part] = [
                {name: self._tensor(array, rank) for name, array in zip(slots, arrays, strict=True)}
                for rank, arrays in enumerate(self.weights(part))
            ]

    def _on_ranks(self, ranks: int, work: Callable[[int], _T], what: str) -> list[_T]:
        """`work` of every rank at the same time: a collective waits for all of them."""
        try:
            return list(self._threads.map(work, range(ranks)))
        except RuntimeError as error:
            raise CompileError(
                f"{what}: the Neuron runtime says {error}; check `neuron-ls`, the SDK's version and that the NEFF was "
                f"compiled for {self.bundle.target}"
            ) from error

    def _tensor(self, array: Array, rank: int) -> Any:
        # bits: numpy itself knows no bfloat16
        plain = array.view(np.uint16) if array.dtype.itemsize == 2 else array
        return self._nrtpy.NrtpyTensor.from_numpy(plain, core_id=rank)


def match_names(infos: Mapping[str, Any], specs: Sequence[TensorSpec], what: str) -> list[str]:
    """A NEFF's own tensor names in the order of `specs`.

    They are the specs' names, or numbered in the module's order (`input0`, `input1`): the number decides, and every
    tensor's bytes must be those of its spec.

    Raises:
        IntegrityError: the NEFF has other tensors.
    """
    wanted = [spec.name for spec in specs]
    names = wanted if set(wanted) == set(infos) else sorted(infos, key=_number)
    sizes = [math.prod(spec.shape) * dtype_of(spec.dtype).itemsize for spec in specs]
    found = [int(infos[name].size) for name in names]
    if found != sizes:
        raise IntegrityError(
            f"{what} has {len(found)} tensors ({', '.join(names[:4])}, ...) of {sum(found)} bytes, its module has "
            f"{len(sizes)} of {sum(sizes)}; compile it again from this bundle's modules"
        )
    return names


def _number(name: str) -> tuple[int, str]:
    digits = re.findall(r"\d+", name)
    return (int(digits[-1]) if digits else -1, name)


def _as_float32(array: Array, spec: TensorSpec) -> Array:
    flat: Array = np.ascontiguousarray(array).reshape(-1).view(dtype_of(spec.dtype)).astype(np.float32)
    return flat.reshape(spec.shape)


def _import_nrtpy() -> Any:
    found = load_runtime(
        "nrtpy",
        "executor neuron needs AWS's nrtpy",
        "install nrtpy and aws-neuronx-runtime-lib from the AWS Neuron package index on a Trainium or Inferentia "
        "instance, or use --executor replicas",
    )
    if not any(DEVICES.glob("neuron[0-9]*")):
        raise ToolchainError(
            f"{DEVICES}/neuron0 does not exist: this machine has no Neuron device or its driver is not loaded; run on "
            "a Trainium or Inferentia instance, or use --executor replicas"
        )
    return found
