"""OpenVINO as a toolchain: graphs linked to the checkpoint's own bytes, run in 16 bits where the device computes so.

On x86 ONNX Runtime has no arithmetic in bfloat16; OpenVINO has, on CPUs with instructions for it. On others it computes
the same graphs in float32. What a device really used is read back from every compiled part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fluxkiln.artifacts.actions import ActionCache
from fluxkiln.compile.executor import Net, check_inputs
from fluxkiln.compile.linker import EXECUTED, GraphExecutor, Linker
from fluxkiln.compile.plan import Made, Plan
from fluxkiln.compile.toolchain import API, ToolStatus
from fluxkiln.errors import CompileError, ToolchainError, UsageError
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.progress import Laps, Progress
from fluxkiln.quantize.schemes import Scheme
from fluxkiln.settings import Settings
from fluxkiln.types import Kind
from fluxkiln.verify.gates import Gate

if TYPE_CHECKING:
    from numpy.typing import NDArray

# the first whose reader knows all operations of a linked graph
OLDEST = (2026, 4)
_INSTALL = "pip install 'fluxkiln[openvino]'"
CPU = "CPU"
# layers that multiply, by the names that OpenVINO gives them
_PRODUCTS = ("FullyConnected", "MatMul", "Convolution", "ScaledDotProductAttention")
# for people
_WORDS = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}

GATES: tuple[Gate, ...] = (
    Gate("executed|device", "F32", "part", "*", "relative_l2", 5e-6, "reference",
         "float32 by OpenVINO's kernels: 4.4e-7 was measured, 1.6e-6 through the convolutions of a VAE"),
    Gate("executed|device", "*", "part", "*", "relative_l2", 6e-3, "previous",
         "the same weights in 8 significant bits (3.9e-3 a rounding): 2.5e-3 was measured of a block; what embeds the "
         "timestep is float32, in bfloat16 it would be off by 0.4"),
)  # fmt: skip


class OpenVino(Linker):
    """See `compile.toolchain.Toolchain`."""

    api = API
    name = "openvino"
    rungs = (EXECUTED,)
    gates = GATES
    executors = ("openvino",)
    takes: Mapping[str, tuple[str, ...]] = {"openvino": ("threads", "device", "fast")}

    def make(
        self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, settings: Settings, progress: Progress, laps: Laps
    ) -> Made:
        if settings.verify:  # said before anything is linked
            load_openvino()
        return super().make(checkpoint, plan, cache, settings, progress, laps)

    def open_graphs(
        self, nets: Mapping[str, Net], schemes: Mapping[str, Scheme], options: Mapping[str, Any], most_open: int = 0
    ) -> GraphExecutor:
        return OpenVinoExecutor(nets, schemes, options, most_open)

    def doctor(self) -> Sequence[ToolStatus]:
        from fluxkiln.compile.doctor import package_status

        return (package_status("openvino", f"verification and images need it: {_INSTALL}"),)


def load_openvino() -> Any:
    """The module; ToolchainError where it is not installed or too old."""
    try:
        import openvino
    except ImportError as error:
        raise ToolchainError(f"OpenVINO is not installed ({error}); {_INSTALL}") from error
    version = openvino.__version__
    if tuple(int(number) for number in version.split("-")[0].split(".")[:2]) < OLDEST:
        least = ".".join(map(str, OLDEST))
        raise ToolchainError(f"OpenVINO {version} cannot read these graphs, {least} is needed; {_INSTALL}")
    return openvino


def find_device(core: Any, asked: str | int | None) -> str:
    """OpenVINO's name of a device; UsageError for a number, ToolchainError where it is not there."""
    if isinstance(asked, int):
        raise UsageError(f"--device {asked}: OpenVINO's devices have names: CPU, GPU, GPU.1, NPU")
    device, found = (asked or CPU).upper(), core.available_devices
    if device not in found and device.partition(".")[0] not in found:
        raise ToolchainError(
            f"--device {asked}: OpenVINO finds {', '.join(found)} on this machine; name one of these, or install the "
            "driver of the other"
        )
    return device


def precision(kind: Kind, scheme: Scheme, device: str = CPU) -> str:
    """What a part is to be computed in, as OpenVINO calls it.

    Sines and cosines of the timestep need float32 whatever the scheme: its multiples of 1000 have more than 8 bits.
    Other devices than CPUs have 16 bits as float16, whose range some kinds leave.
    """
    if kind.timed or scheme.arithmetic == "F32" or (kind.overflows and device != CPU):
        return "f32"
    return "bf16" if scheme.arithmetic == "BF16" and device == CPU else "f16"


def precision_used(compiled: Any) -> str:
    """What the products of a compiled model give, for people, by what OpenVINO says of its layers.

    Of packed weights it calls the codes' own type the one that a layer runs in.
    """
    facts = (node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops())
    layers = ({key: one[key].astype(str) for key in ("layerType", "outputPrecisions")} for one in facts)
    found = sorted({one["outputPrecisions"] for one in layers if one["layerType"] in _PRODUCTS})
    return " and ".join(dict.fromkeys(_WORDS.get(name, name) for name in found))


class OpenVinoExecutor(GraphExecutor):
    """See `compile.linker.GraphExecutor`.

    Args:
        options: `device`, OpenVINO's name of one. `threads` of a CPU. `fast`: products with packed weights round their
            activations to 8 bits while they run, a scale for each group of the weight, where the CPU has instructions
            for such products.

    Raises:
        ToolchainError: OpenVINO or the device is not there. UsageError: no name of a device.
    """

    def __init__(
        self, nets: Mapping[str, Net], schemes: Mapping[str, Scheme], options: Mapping[str, Any], most_open: int = 0
    ) -> None:
        super().__init__({part: net.component for part, net in nets.items()}, most_open)
        self.openvino = load_openvino()
        self.core = self.openvino.Core()
        self.device = find_device(self.core, options.get("device"))
        self.nets, self.schemes = nets, schemes
        self.threads, self.fast = int(options.get("threads") or 0), bool(options.get("fast"))
        self.name = "openvino, fast" if self.fast else "openvino"
        self.used: dict[str, str] = {}  # kind -> arithmetic of its products

    def config(self, part: str) -> dict[str, Any]:
        """OpenVINO's settings for a part."""
        scheme, kind = self.schemes[part], self.nets[part].kind
        config: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": precision(kind, scheme, self.device), "PERFORMANCE_HINT": "LATENCY",
        }  # fmt: skip
        if self.device == CPU:
            config["INFERENCE_NUM_THREADS"] = self.threads
            config["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = scheme.group_size if self.fast else 0
        return config

    def open(self, part: str) -> Any:
        """An inference request of a part; errors as a call."""
        from fluxkiln.compile.onnx.session import check_files

        graph = self.nets[part].file
        check_files(graph)  # mapped, a short file would end the process
        try:
            compiled = self.core.compile_model(self.core.read_model(graph), self.device, self.config(part))
        except RuntimeError as error:
            raise CompileError(f"OpenVINO refuses part {part} on {self.device}: {_last_line(error)}") from error
        if used := precision_used(compiled):
            self.used[self.nets[part].kind.name] = used
            self.ran[f"products on {', '.join(compiled.get_property('EXECUTION_DEVICES'))}"] = self.arithmetic
        return compiled.create_infer_request()

    def run(self, session: Any, part: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        import numpy as np

        net = self.nets[part]
        check_inputs(net, inputs)
        given = {spec.name: np.ascontiguousarray(inputs[spec.name], spec.dtype) for spec in net.inputs}
        try:
            results = session.infer(given)
        except RuntimeError as error:
            raise CompileError(f"OpenVINO could not run part {part}: {_last_line(error)}") from error
        return {port.get_any_name(): np.array(values, np.float32) for port, values in results.items()}

    @property
    def arithmetic(self) -> str:
        """What products run in, for people: that of most kinds of parts last."""
        kinds: dict[str, list[str]] = {}
        for kind, used in self.used.items():
            kinds.setdefault(used, []).append(kind)
        *others, most = sorted(kinds, key=lambda used: len(kinds[used]))
        said = [f"{used} in {', '.join(kinds[used])}" for used in others]
        return ", ".join([*said, most + " otherwise" * bool(said)])

    @property
    def facts(self) -> Mapping[str, str]:
        full = self.core.get_property(self.device, "FULL_DEVICE_NAME")
        device = f"{self.device} ({full})" + (f", {self.arithmetic}" if self.used else "")
        return {"runtime": f"OpenVINO {self.openvino.__version__.split('-')[0]}", "device": device}


def _last_line(error: Exception) -> str:
    """Where OpenVINO says what is wrong; above it stand places in its source."""
    return str(error).strip().splitlines()[-1].strip()


TOOLCHAIN = OpenVino()
