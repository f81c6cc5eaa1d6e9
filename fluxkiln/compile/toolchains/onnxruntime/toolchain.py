"""ONNX Runtime as a toolchain: graphs linked to the checkpoint's own bytes, which any CPU runs in float32."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.artifacts.actions import ActionCache
from fluxkiln.compile.executor import Net
from fluxkiln.compile.linker import EXECUTED, GraphExecutor, Linker
from fluxkiln.compile.plan import Plan
from fluxkiln.compile.toolchain import API
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.progress import Progress
from fluxkiln.quantize.schemes import Scheme
from fluxkiln.types import Part
from fluxkiln.verify.findings import PartFindings, Record
from fluxkiln.verify.gates import Gate

if TYPE_CHECKING:
    from numpy.typing import NDArray

# of all sessions together; those that do not work sleep, but systems limit their number
MOST_THREADS = 4000


RUNGS = (EXECUTED,)

GATES: tuple[Gate, ...] = (
    Gate("executed|device", "F32", "part", "*", "relative_l2", 5e-6, "reference",
         "float32 by ONNX Runtime's kernels, as at its own rung"),
    Gate("executed|device", "*", "part", "*", "relative_l2", 2e-3, "previous",
         "the same codes in float32 on both sides; norm weights are rounded to 16 bits before or after the softmax "
         "factor is in them: 5e-4 was measured"),
)  # fmt: skip


class OnnxRuntime(Linker):
    """See `compile.toolchain.Toolchain`."""

    api = API
    name = "onnxruntime"
    rungs = RUNGS
    gates = GATES
    executors = ("ort",)
    takes: Mapping[str, tuple[str, ...]] = {"ort": ("threads", "fast")}

    def rung(self, plan: Plan) -> str:
        # without quantization the bundle's own graphs are the exported templates
        return EXECUTED.name if plan.quantized else "onnxruntime"

    def open_graphs(
        self, nets: Mapping[str, Net], schemes: Mapping[str, Scheme], options: Mapping[str, Any], most_open: int = 0
    ) -> GraphExecutor:
        graphs = {part: net.file for part, net in nets.items()}
        components = {part: net.component for part, net in nets.items()}
        threads, fast = int(options.get("threads") or 0), bool(options.get("fast"))
        return OrtExecutor(graphs, components, threads=threads, fast=fast, most_open=most_open, spin=bool(most_open))

    def look(
        self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, part: Part, record: Record, progress: Progress
    ) -> PartFindings:
        from fluxkiln.compile.toolchains.onnxruntime.look import look

        return look(checkpoint, plan, cache, part, record, progress)


class OrtExecutor(GraphExecutor):
    """See `compile.linker.GraphExecutor`.

    Args:
        graphs: part -> graph; components: part -> component.
        threads: for one operation; 0 for one on each core.
        spin: threads that wait for work keep their core busy: faster for one session, slower for many in turn.
        fast: products with packed weights round their activations to 8 bits (see `onnx.products`); its name says so.
    """

    def __init__(
        self,
        graphs: Mapping[str, Path],
        components: Mapping[str, str],
        *,
        threads: int = 0,
        most_open: int = 0,
        spin: bool = False,
        fast: bool = False,
    ) -> None:
        super().__init__(components, most_open)
        self.graphs = dict(graphs)
        # 0 lets ONNX Runtime take all cores, unless that many sessions would have too many threads
        most = max(1, MOST_THREADS // max(1, most_open or len(graphs)))
        self.threads = threads or (0 if (os.cpu_count() or 1) <= most else most)
        self.options = {"spin": spin, "fast": fast}
        self.name = "ort, fast" if fast else "ort"

    def open(self, part: str) -> Any:
        from fluxkiln.compile.onnx.session import open_session

        return open_session(self.graphs[part], threads=self.threads, **self.options)

    def run(self, session: Any, part: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        from fluxkiln.compile.onnx.session import run_session

        return run_session(session, part, inputs)

    @property
    def facts(self) -> Mapping[str, str]:
        import onnxruntime

        fast = self.options["fast"]
        arithmetic = "8-bit products of packed weights, float32 otherwise" if fast else "float32 arithmetic"
        return {"runtime": f"ONNX Runtime {onnxruntime.__version__}", "device": f"CPU, {arithmetic}"}


TOOLCHAIN = OnnxRuntime()
