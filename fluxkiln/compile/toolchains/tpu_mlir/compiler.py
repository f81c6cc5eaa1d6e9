"""The TPU-MLIR adapter: a filled graph to a bmodel, and what is checked after every compile.

Source of flags and file names: TPU-MLIR 1.30.2, `model_transform.py` and `model_deploy.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxkiln.compile.onnx.filled import WeightMatMul, weight_matmuls
from fluxkiln.compile.onnx.scores import find_scores
from fluxkiln.compile.process import run_tool
from fluxkiln.compile.toolchains.tpu_mlir import environment
from fluxkiln.compile.toolchains.tpu_mlir.bmodel import normalise_time, read_bmodel
from fluxkiln.compile.toolchains.tpu_mlir.environment import TpuMlirEnv, tool_argv, tpu_mlir_environ
from fluxkiln.compile.toolchains.tpu_mlir.gelu import OPERATION, count_gelus
from fluxkiln.compile.toolchains.tpu_mlir.integers import ask_for_integers, check_integers
from fluxkiln.errors import CompileError, ToolchainError
from fluxkiln.quantize.schemes import Scheme, check_groups

# sin and cos of large arguments lose them in 16 bits, so they and all that feeds them stay in F32
F32_ANCESTORS_OF = ("Sin", "Cos")
# Of kinds whose nodes stand in the order that the chip is to run them in (`small_work_first`). With it the most
# thorough search for slices that fit into local memory costs 3 s a block and gains another per cent.
_ORDERED = ["--disable_topo_sort", "--shape_secs_search_strategy", "2"]
_TRANSFORM = Path(__file__).with_name("transform.py")
_DEPLOY = Path(__file__).with_name("deploy.py")
_LOCATION = re.compile(r'loc\("([^"]+)"\)')
_SHAPE = re.compile(r"tensor<([0-9x]+)x([a-z0-9]+)>")
PROFILE = "compiler_profile_0.txt"
# what a GroupNorm, InstanceNormalization in opset 17, is called when the compiler has found it
_GROUPED = "InstanceNormalization_r_GroupNorm"
# of the unit that the profile counts in: its own `runtime` is TCYC divided by this
_CYCLES_PER_MS: Mapping[str, int] = {"bm1684x": 1_000_000, "bm1684x2": 1_500_000, "bm1688": 900_000}
_ESTIMATES = ("estimate_ms", "estimate_tensor_ms", "estimate_memory_ms")


@dataclass(frozen=True, slots=True)
class CompileJob:
    """One graph to compile.

    Attributes:
        net: the net's name in the bmodel.
        graph: the filled ONNX file; template: the opset 17 template it was made of.
        activations: the graph inputs that are not slots.
        narrow_inputs, narrow_outputs: inputs or outputs in the scheme's 16-bit type instead of float32.
        rotated: queries and keys whose rotation must have become one operation each.
        ordered: the template's nodes stand in the order in which the chip is to run them.
        keep_f32: leave sinusoids in F32 (never off but in the test that shows what is lost).
        narrow_gelus: GELUs in 16 bits, where the chip has no others. float_groups: GroupNorms in float32.
    """

    net: str
    graph: Path
    template: Path
    activations: frozenset[str]
    scheme: Scheme
    chip: str
    narrow_inputs: bool = False
    narrow_outputs: bool = False
    rotated: int = 0
    ordered: bool = False
    keep_f32: bool = True
    narrow_gelus: bool = False
    float_groups: bool = False


@dataclass(frozen=True, slots=True)
class Compiled:
    """What a compile leaves: `lowered` and `weights` are the graph and the weight file that the interpreter runs."""

    bmodel: Path
    lowered: Path
    weights: Path
    facts: Mapping[str, Any]


def compile_graph(env: TpuMlirEnv, job: CompileJob, folder: Path, log: Path) -> Compiled:
    """Compile one graph in `folder`, an empty folder of its own, and check the result.

    Raises:
        CompileError: the compiler failed, or left out a quantization or a fusion.
        SchemeError: the group size does not divide a weight (the compiler would leave it unquantized without a word).
        ResourceError: the compiler was killed for memory.
    """
    every = weight_matmuls(job.template, set(job.activations))
    matmuls = [one for one in every if job.scheme.in_codes(one.slot)]
    for one in matmuls:
        check_groups(job.scheme, one.slot, one.in_features)
    environ = tpu_mlir_environ(env, job.chip)
    python, tool = tool_argv(env, "model_transform")
    transform = [python, str(_TRANSFORM), tool, "--model_name", job.net, "--model_def", str(job.graph)]
    # the flag is read as bool(text): only the empty text is false; the template is folded already
    run_tool([*transform, "--mlir", "top.mlir", "--do_onnx_sim", ""], folder, environ, log, f"{job.net} transform")
    python, tool = tool_argv(env, "model_deploy")
    deploy = [python, str(_DEPLOY), tool, "--mlir", "top.mlir", "--chip", job.chip, "--model", "net.bmodel"]
    coded = f"W{job.scheme.weight_bits}BF16" if job.scheme.weight_bits else job.scheme.arithmetic
    deploy += ["--quantize", "INT8" if job.scheme.integer else coded, *_ORDERED * job.ordered]
    if job.scheme.group_size:
        deploy += ["--q_group_size", str(job.scheme.group_size)]
    if job.scheme.arithmetic != "F32":
        deploy += ["--quant_input"] * job.narrow_inputs + ["--quant_output"] * job.narrow_outputs
    if job.scheme.integer:
        products = set(_lowered_names(matmuls, folder / "top.mlir"))
        scores = {f"{name}_MatMul" for name in _scores(job)}
        deploy += ask_for_integers(folder, products, scores, job.scheme.limit, job.scheme.arithmetic)
    elif job.scheme.arithmetic != "F32":
        table = (
            dict.fromkeys(f32_table(job.graph, not job.narrow_gelus, job.float_groups), "F32") if job.keep_f32 else {}
        )
        if job.scheme.weight_bits:
            kept = [one for one in every if one not in matmuls]
            table |= dict.fromkeys(_lowered_names(kept, folder / "top.mlir"), job.scheme.arithmetic)
        if table:
            (folder / "table").write_text("".join(f"{name} {mode}\n" for name, mode in table.items()))
            deploy += ["--quantize_table", "table"]
    run_tool(deploy, folder, environ, log, f"{job.net} deploy")
    return _check(job, matmuls, folder)


def require_compiler(what: str) -> TpuMlirEnv:
    """TPU-MLIR's environment; ToolchainError when it is not there and the store lacks `what`."""
    env = environment.installed()
    if env is None:
        raise ToolchainError(
            f"{what} is not in the store, and TPU-MLIR, which makes it, is not installed in "
            f"{environment.default_tpu_mlir_root()}; run make env-tpu-mlir, name a finished environment with "
            "FLUXKILN_TPU_MLIR, or bring moulds from a machine that has it (fluxkiln mould export there, fluxkiln "
            "mould import here)"
        )
    return env


def combine(env: TpuMlirEnv, chip: str, parts: list[Path], target: Path, log: Path) -> None:
    """Combine single-net bmodels into one file in the given order; net names must differ."""
    links = []
    for index, part in enumerate(parts):  # model_tool wants the suffix, blobs of the store have none
        links.append(target.parent / f"{index:03d}.bmodel")
        links[-1].symlink_to(part.absolute())
    argv = [*tool_argv(env, "model_tool"), "--combine", *map(str, links), "-o", str(target)]
    run_tool(argv, target.parent, tpu_mlir_environ(env, chip), log, f"combine {target.name}")
    normalise_time(target)


def f32_table(graph: Path, gelus: bool = True, groups: bool = False) -> tuple[str, ...]:
    """Names, as the compiler gives them, of GELUs, of sinusoids, and all operations between these and inputs.

    Some chips would compute a GELU in 16 bits, and 1 + tanh has none of them left where it is small: on a bm1688 36 %
    of what is below -1 was lost.
    """
    import onnx_ir as ir

    model = ir.load(graph)
    names = {f"{node.outputs[0].name}_{node.op_type}" for node in model.graph if gelus and node.op_type == OPERATION}
    if groups:
        names |= {
            f"{node.outputs[0].name}_{_GROUPED}" for node in model.graph if _GROUPED.startswith(f"{node.op_type}_")
        }
    pending = [node for node in model.graph if node.op_type in F32_ANCESTORS_OF]
    while pending:
        node = pending.pop()
        name = f"{node.outputs[0].name}_{node.op_type}"
        if name in names or node.op_type in ("Shape", "Constant"):
            continue
        names.add(name)
        producers = (value.producer() for value in node.inputs if value is not None)
        pending += [producer for producer in producers if producer is not None]
    return tuple(sorted(names))


def _lowered_names(matmuls: list[WeightMatMul], top: Path) -> Iterator[str]:
    """What the compiler calls these matmuls: a bias that is merged into one has given it the name of its addition."""
    known = set(_LOCATION.findall(top.read_text())) if matmuls else set()
    for one in matmuls:
        names = (f"{one.output}_{one.operation}", *(f"{output}_Add" for output in one.sums))
        found = [name for name in names if name in known]
        if not found:
            raise CompileError(f"the compiler has no operation for {one.output}, which multiplies with {one.slot}")
        yield found[0]


def _scores(job: CompileJob) -> list[str]:
    """The products of queries and keys that are to be in integers."""
    return [one.output for one in find_scores(job.template, job.activations)] if job.scheme.limit else []


def _check(job: CompileJob, matmuls: list[WeightMatMul], folder: Path) -> Compiled:
    found = sorted(folder.glob("*_tpu.mlir"))
    if len(found) != 1:
        raise CompileError(
            f"{job.net}: the compiler left {len(found)} files *_tpu.mlir, 1 is expected; pin TPU-MLIR 1.30.2"
        )
    text = found[0].read_text()
    bmodel = folder / "net.bmodel"
    if not bmodel.is_file():
        raise CompileError(f"{job.net}: the compiler succeeded but wrote no bmodel; pin TPU-MLIR 1.30.2")
    normalise_time(bmodel)
    count, quantized = text.count('"tpu.A16MatMul"'), _quantized_weights(text)
    if job.scheme.integer:
        count, quantized = check_integers(text, len(matmuls), len(_scores(job)), job.scheme.limit, job.net)
    expected = _weight_elements(job.template, matmuls) if job.scheme.weight_bits else 0
    if quantized != expected:
        raise CompileError(
            f"{job.net}: {quantized} weights are stored in {job.scheme.weight_bits} bits, scheme {job.scheme.name} "
            f"asks for {expected}; the compiler left some rows or a matmul unquantized: leave what it does not take "
            "out of the scheme, KIND.WEIGHT=BF16"
        )
    check_fusions(job.rotated, text, job.net)
    # a scheme in integers has GELUs in 16 bits, as it has what comes of its products
    rounded = job.narrow_gelus or job.scheme.integer or not job.keep_f32
    check_gelus(count_gelus(job.graph), text, job.net, rounded)
    (net,) = read_bmodel(bmodel).nets
    narrow = {"BF16": "bfloat16", "F16": "float16"}.get(job.scheme.arithmetic)
    for asked, tensors, side in ((job.narrow_inputs, net.inputs, "input"), (job.narrow_outputs, net.outputs, "output")):
        if asked and narrow and not any(tensor.dtype == narrow for tensor in tensors):
            raise CompileError(f"{job.net}: no {side} is {narrow}, though the target passes {narrow} between blocks")
    facts = {
        "net": net.name,
        "quantized_matmuls": count,
        "quantized_weights": quantized,
        "fused_rope": text.count('"tpu.Rope"'),
        "inputs": [[tensor.name, tensor.dtype, list(tensor.shape)] for tensor in net.inputs],
        "outputs": [[tensor.name, tensor.dtype, list(tensor.shape)] for tensor in net.outputs],
        "weight_bytes": net.coefficients.size,
        "instruction_bytes": net.instruction_bytes,
        "runtime_bytes": net.runtime_bytes,
        **read_estimate(folder, job.chip),
    }
    return Compiled(bmodel, found[0], folder / weight_file(text), facts)


def read_estimate(folder: Path, chip: str) -> dict[str, float | None]:
    """What the compiler itself thinks that one run of its code takes, by the schedule that a compile leaves here.

    No board is involved: the figures rank formulations and show where a net waits, no time was measured. They are None,
    never 0, where there is no schedule, or none in the form known here: another version may write another.

    Returns:
        `estimate_ms` from the first command to the last; `estimate_tensor_ms` and `estimate_memory_ms`: how long the
        tensor unit computes and the memory unit moves data, which overlap: the rest of the first is waiting.

    Source: TPU-MLIR 1.30.2, a line for each command, in a column for the tensor unit (`ENGINE_BD`) and one for the
    memory unit (`ENGINE_GDMA`), `t` being cycles; then `TCYC`, the cycles until the last of both ends, and for a net
    that computes anything the same as `runtime` in ms.
    """
    try:
        text = (folder / PROFILE).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        text = ""
    totals, runtimes = re.findall(r"(?m)^TCYC : (\d+)\b", text), re.findall(r"\bruntime: ([0-9.]+)ms", text)
    cycles = int(totals[0]) if len(totals) == 1 and chip in _CYCLES_PER_MS else 0
    per_ms = _CYCLES_PER_MS.get(chip, 1)
    if not cycles or (runtimes and not math.isclose(float(runtimes[-1]), cycles / per_ms, rel_tol=1e-4, abs_tol=1e-6)):
        return dict.fromkeys(_ESTIMATES)
    spent = [0, 0]
    for count, memory in re.findall(r"\|e:\d+\|t:(\d+)(\|dr:)?", text):
        spent[bool(memory)] += int(count)
    return dict(zip(_ESTIMATES, (count / per_ms for count in (cycles, *spent)), strict=True))


def weight_file(lowered: str) -> str:
    """The name under which a lowered graph looks for its weights, beside itself."""
    found = re.search(r'module\.weight_file = "([\w.-]+)"', lowered)
    if found is None:
        raise CompileError("the lowered graph names no weight file; pin TPU-MLIR 1.30.2")
    return found.group(1)


def check_fusions(wanted: int, lowered: str, net: str) -> None:
    """Raise CompileError unless RoPE became the chip's own operation: unfused it makes a block 3.6 times slower."""
    found = lowered.count('"tpu.Rope"')
    if found < wanted:
        raise CompileError(
            f"{net}: {found} of {wanted} rotary embeddings were fused to tpu.Rope; the traced form of RoPE changed: "
            "compare the model's patches with the pinned diffusers"
        )


def check_gelus(wanted: int, lowered: str, net: str, narrow: bool = False) -> None:
    """Raise CompileError unless every tanh GELU of the filled graph became the chip's own operation, in float32 unless
    they may be `narrow`."""
    lines = [line for line in lowered.splitlines() if "active_mode TGELU" in line]
    if len(lines) != wanted:
        raise CompileError(
            f"{net}: {len(lines)} of {wanted} tanh GELUs became one operation of the chip; pin TPU-MLIR 1.30.2 or "
            "compare its converter with fluxkiln/compile/toolchains/tpu_mlir/transform.py"
        )
    if not narrow and (rounded := [line for line in lines if "f32>" not in line.rpartition("->")[2]]):
        raise CompileError(
            f"{net}: {len(rounded)} of {wanted} tanh GELUs are computed in 16 bits, which lose what is small; pin "
            "TPU-MLIR 1.30.2 or compare its names of operations with f32_table"
        )


def _quantized_weights(text: str) -> int:
    """How many weights all A16MatMul operations have; 4-bit codes are stored two a byte."""
    total = 0
    for line in text.splitlines():
        if '"tpu.A16MatMul"' in line:
            bits = int(re.search(r"weight_bits = (\d+)", line).group(1))  # type: ignore[union-attr]
            dims, _ = _SHAPE.findall(line.split(" : (")[1])[1]
            total += math.prod(int(size) for size in dims.split("x")[-2:]) * 8 // bits
    return total


def _weight_elements(template: Path, matmuls: list[WeightMatMul]) -> int:
    import onnx_ir as ir

    inputs = ir.load(template).graph.inputs
    shapes = {value.name: value.shape.numpy() for value in inputs if value.shape is not None}
    return sum(math.prod(shapes[one.slot]) for one in matmuls)
