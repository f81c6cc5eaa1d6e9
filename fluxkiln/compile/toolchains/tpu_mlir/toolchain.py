"""TPU-MLIR as a toolchain: kinds compiled once into moulds, every part's weights cast into them."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.artifacts.actions import ActionCache
from fluxkiln.compile.bundle import Bundle
from fluxkiln.compile.executor import Executor
from fluxkiln.compile.plan import Job, Made, Plan
from fluxkiln.compile.toolchain import API, OpenRungs, Rungs, Toolchain, ToolStatus, Work
from fluxkiln.compile.toolchains.tpu_mlir import environment
from fluxkiln.compile.toolchains.tpu_mlir.python310 import find_python310
from fluxkiln.errors import SchemeError, ToolchainError
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.progress import Laps, Progress
from fluxkiln.settings import Settings
from fluxkiln.types import Part
from fluxkiln.verify.findings import PartFindings, Record
from fluxkiln.verify.gates import STORED, Gate, Rung

if TYPE_CHECKING:
    from fluxkiln.verify.ladder import Ladder

# Elements that one convolution makes in the interpreter, which takes a plain loop for them: with 1.7e7 the whole tiny
# decoder takes 4 s, with 6.7e7 one convolution takes minutes.
MOST_CONVOLVED = 30_000_000

RUNGS: tuple[Rung, ...] = (
    Rung("interpreter", 8, "the compiler's lowered graph, interpreted",
         "lowering: the precision of activations, or one operator", STORED, series=4),
    Rung("stored", 9, "the weights in the binary, byte by byte",
         "casting: a code, scale or zero point that is not the one this scheme makes of this weight", series=1,
         exact=True),
    Rung("simulator", 10, "the compiled binary on the chip's simulator",
         "code generation, or coefficients cast into the wrong place", STORED, series=5),
)  # fmt: skip
_COMPILED = "interpreter|simulator|device"

GATES: tuple[Gate, ...] = (
    Gate("stored", "*", "*", "*", "max_abs", 0.0, "reference",
         "a cast writes the very bytes that the scheme makes of the checkpoint's weights, and no other"),
    Gate("interpreter|device", "F32", "part", "*", "relative_l2", 5e-6, "reference",
         "float32 by yet other kernels, which sum in another order, as ONNX Runtime's do"),
    Gate("simulator", "F32", "part", "*", "relative_l2", 1e-6, "reference",
         "float32 weights and arithmetic on the chip: 5e-8 was measured on a block"),
    # With quantization out of the way: the compiled arithmetic against the rung before it.
    Gate(_COMPILED, "W4BF16*|W8BF16*", "whole", "*", "relative_l2", 6e-3, "previous",
         "the same codes on both sides, so only BF16 arithmetic may differ"),
    Gate(_COMPILED, "W8A8*", "residual", "*", "delta_cosine", 0.999, "previous",
         "the same integers but where BF16 lies on the other side of a step: 2 % of the delta, a cosine of 0.9998",
         proposed=True),
    Gate(_COMPILED, "W4BF16*|W8BF16*", "residual", "*", "delta_cosine", 0.999, "previous",
         "the same codes on both sides, so the delta must agree as well as it does in BF16"),
    Gate(_COMPILED, "BF16|W8BF16*|W8A8*|W4BF16*", "block", "*", "worst_channel", 0.2, "previous",
         "a wrong scale or bias moves one channel by its own size, BF16 moves none by more than twice its 4 %",
         proposed=True),
)  # fmt: skip


class TpuMlir(Toolchain):
    """See `compile.toolchain.Toolchain`; what imports more than this is imported when it is asked for."""

    api = API
    name = "tpu_mlir"
    rungs = RUNGS
    gates = GATES
    executors = ("cmodel", "sail")
    takes: Mapping[str, tuple[str, ...]] = {"sail": ("device",)}
    compiler_stages = ("mould", "compile", "combine")
    travelling = ("template", "mould", "proof", "combine")
    proven = ("mould",)
    call_seconds = 1.5
    unproven = "no board ran"
    many_sizes = True
    most_convolved = MOST_CONVOLVED

    def label(self, settings: Settings) -> str:
        memory = f"{settings.device_memory >> 20}mib" if settings.device_memory else ""
        chips = f"{settings.devices}chips" if settings.devices else ""
        return "".join(f"-{one}" for one in (settings.board, memory, chips) if one)

    def facts(self, settings: Settings, plan: Plan) -> dict[str, Any]:
        given = settings.board or settings.device_memory or settings.devices
        return {"devices": {"bytes": plan.target.device_bytes, "most": plan.target.devices}} if given else {}

    def tools(self, plan: Plan) -> dict[str, str]:
        env = environment.installed()
        return {} if env is None else {"tpu_mlir": env.version}

    def check(self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache) -> None:
        """Refuse weights that no way of loading gets onto the devices; instructions and memory to run come on top."""
        from fluxkiln.compile.toolchains.tpu_mlir.devices import group_parts, plan_devices
        from fluxkiln.compile.toolchains.tpu_mlir.jobs import planned_binaries

        integer = [part for part in plan.parts if plan.scheme(part).integer]
        if integer and not any(part.traits.rows for part in plan.parts):
            raise SchemeError(
                f"{integer[0].name} is to be {plan.scheme(integer[0]).name}, which takes its modulation from a part of "
                "its own; leave --modulation inline out"
            )
        plan_devices(plan, group_parts(plan, planned_binaries(checkpoint, plan, cache)))

    def jobs(self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, settings: Settings) -> list[Job]:
        from fluxkiln.compile.toolchains.tpu_mlir.jobs import plan_jobs

        return plan_jobs(checkpoint, plan, cache, settings)

    def devices(self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache) -> dict[str, Any]:
        from fluxkiln.compile.toolchains.tpu_mlir import measured
        from fluxkiln.compile.toolchains.tpu_mlir.devices import plan_files
        from fluxkiln.compile.toolchains.tpu_mlir.jobs import planned_binaries

        return {
            **plan_files(checkpoint, plan, planned_binaries(checkpoint, plan, cache)),
            "measured": measured.describe_table(),
        }

    def make(
        self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, settings: Settings, progress: Progress, laps: Laps
    ) -> Made:
        from fluxkiln.compile.toolchains.tpu_mlir.jobs import make_files

        return make_files(checkpoint, plan, cache, settings, progress, laps)

    def build_moulds(
        self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, settings: Settings, progress: Progress
    ) -> set[str]:
        from fluxkiln.compile.toolchains.tpu_mlir.jobs import prove_moulds

        return {mould.result.key for mould in prove_moulds(checkpoint, plan, cache, settings, progress)}

    def open_rungs(
        self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, made: Made, folder: Path, progress: Progress
    ) -> AbstractContextManager[OpenRungs]:
        from fluxkiln.compile.toolchains.tpu_mlir.rungs import open_rungs

        return open_rungs(checkpoint, plan, cache, made, folder)

    def execute(
        self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, made: Made, folder: Path
    ) -> AbstractContextManager[Rungs]:
        from fluxkiln.compile.toolchains.tpu_mlir.rungs import execute

        return execute(checkpoint, plan, cache, made, folder)

    def can_execute(self, work: Work) -> bool:
        return work.widest_convolution <= MOST_CONVOLVED

    def read_back(self, ladder: Ladder, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, made: Made) -> None:
        from fluxkiln.compile.toolchains.tpu_mlir.rungs import read_back

        read_back(ladder, checkpoint, plan, cache, made)

    def look(
        self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, part: Part, record: Record, progress: Progress
    ) -> PartFindings:
        from fluxkiln.compile.toolchains.tpu_mlir.rungs import look

        return look(checkpoint, plan, cache, part, record, progress)

    def report(self, checkpoint: Checkpoint, plan: Plan, made: Made) -> dict[str, Any]:
        from fluxkiln.compile.toolchains.tpu_mlir.devices import report_devices

        return report_devices(checkpoint, plan, made.binaries)

    def check_record(self, record: Mapping[str, Any], outputs: Mapping[str, Path]) -> None:
        from fluxkiln.compile.toolchains.tpu_mlir.nets import check_mould

        if record["stage"] == "mould" and outputs:
            check_mould(record, outputs)

    def check_parts(self, bundle: Bundle, fresh: Collection[str]) -> None:
        from fluxkiln.compile.toolchains.tpu_mlir.nets import check_nets

        check_nets(bundle, fresh)

    def open_executor(self, bundle: Bundle, name: str | None, options: Mapping[str, Any]) -> Executor:
        from fluxkiln.compile.toolchains.tpu_mlir.executors import SailExecutor, open_cmodel

        return SailExecutor(bundle.nets, options.get("device") or 0) if name == "sail" else open_cmodel(bundle)

    def doctor(self) -> Sequence[ToolStatus]:
        from fluxkiln.compile.doctor import runtime_status

        root, env = environment.default_tpu_mlir_root(), environment.installed()
        remedy = "the executor sail needs it, on a machine with a BM1684X: install the wheel of your Sophgo SDK"
        packages = ("sophon", "sophon-arm", "sophon-sail")
        sail = runtime_status("sophon-sail", "sophon", packages, remedy, "sail")
        if env is not None:
            version = f"{env.version} (self-check relative L2 {env.check_rel_l2:.1e})"
            return ToolStatus("tpu-mlir", True, version, str(root), ""), sail
        state = "unfinished or of another version" if (root / "bin").is_dir() else "not made yet"
        remedy = (
            f"{state}: the next build that needs it makes version {environment.TPU_MLIR_VERSION}, or run "
            f"`{sys.executable} -m {environment.__name__}`"
        )
        try:
            python310 = ToolStatus("python3.10", True, "3.10", str(find_python310()), "")
        except ToolchainError as error:
            python310 = ToolStatus("python3.10", False, "", "", str(error))
        return ToolStatus("tpu-mlir", False, "", str(root), remedy), python310, sail


TOOLCHAIN = TpuMlir()
