"""Tanh GELU as one operation: recognised in every spelling order, nothing else taken for it, exact on the chip."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper

from fluxkiln.compile.onnx.filled import fill
from fluxkiln.compile.toolchains.tpu_mlir import compiler as adapter
from fluxkiln.compile.toolchains.tpu_mlir.compiler import CompileJob, compile_graph
from fluxkiln.compile.toolchains.tpu_mlir.executors import Simulator
from fluxkiln.compile.toolchains.tpu_mlir.gelu import CUBIC, INNER, fuse_tanh_gelu
from fluxkiln.quantize.schemes import parse_scheme

SHAPE = (1, 8, 256)
# in the order of computation: operation, operands (a number is a constant), result
CHAIN = (
    ("Mul", "x", "x", "square"),
    ("Mul", "x", "square", "cube"),
    ("Mul", CUBIC, "cube", "cubic"),
    ("Add", "x", "cubic", "sum"),
    ("Mul", INNER, "sum", "inner"),
    ("Tanh", "inner", None, "tanh"),
    ("Add", 1.0, "tanh", "plus"),
    ("Mul", "x", "plus", "times"),
    ("Mul", 0.5, "times", "y"),
)


def write(path, chain=CHAIN, outputs=("y",)):
    """A graph of x and this chain."""
    nodes, constants = [], []
    for operation, first, second, result in chain:
        names = []
        for operand in (first, second):
            if isinstance(operand, float):
                constants.append(helper.make_tensor(f"c{len(constants)}", TensorProto.FLOAT, [], [operand]))
                names.append(constants[-1].name)
            elif operand is not None:
                names.append(operand)
        nodes.append(helper.make_node(operation, names, [result]))
    info = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, SHAPE) for name in ("x", *outputs)}
    graph = helper.make_graph(nodes, "gelu", [info["x"]], [info[name] for name in outputs], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def operations(model):
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("swapped", [False, True])
def test_the_chain_becomes_one_node(tmp_path, swapped):
    chain = [(name, b, a, out) if swapped and b is not None else (name, a, b, out) for name, a, b, out in CHAIN]
    model = ir.load(write(tmp_path / "gelu.onnx", chain))
    assert fuse_tanh_gelu(model) == 1
    (node,) = model.graph
    assert (node.domain, node.op_type) == ("com.microsoft", "FastGelu")
    assert [value.name for value in node.inputs] == ["x"]
    assert [value.name for value in model.graph.outputs] == ["y"]
    assert tuple(model.graph.outputs[0].shape.numpy()) == SHAPE


@pytest.mark.parametrize(
    ("place", "changed"),
    [
        (0, ("Mul", "x", 2.0, "square")),
        (1, ("Mul", "square", "square", "cube")),
        (2, ("Mul", 0.0447, "cube", "cubic")),
        (3, ("Sub", "x", "cubic", "sum")),
        (4, ("Mul", 0.8, "sum", "inner")),
        (5, ("Sigmoid", "inner", None, "tanh")),
        (6, ("Add", 2.0, "tanh", "plus")),
        (7, ("Mul", "cubic", "plus", "times")),
        (8, ("Mul", 0.25, "times", "y")),
    ],
)
def test_another_function_stays_as_it_is(tmp_path, place, changed):
    chain = [*CHAIN[:place], changed, *CHAIN[place + 1 :]]
    model = ir.load(write(tmp_path / "other.onnx", chain))
    assert fuse_tanh_gelu(model) == 0
    assert operations(model) == [name for name, *_ in chain]


def test_what_something_else_reads_is_kept(tmp_path):
    model = ir.load(write(tmp_path / "shared.onnx", outputs=("y", "tanh")))
    assert fuse_tanh_gelu(model) == 1
    assert operations(model) == ["Mul", "Mul", "Mul", "Add", "Mul", "Tanh", "FastGelu"]
    assert [value.name for value in model.graph.outputs] == ["y", "tanh"]


def test_every_tanh_of_the_templates_is_one(tiny_template):
    # CLIP has none, its own activation is another
    for kind in ("single", "double", "t5_block", "clip"):
        model = ir.load(tiny_template(kind, "onnx17").path)
        tanhs = operations(model).count("Tanh")
        assert (tanhs > 0) == (kind != "clip")
        assert fuse_tanh_gelu(model) == tanhs
        assert "Tanh" not in operations(model)


SCHEMES = ("F32", "F16", "BF16")


@pytest.fixture(scope="module")
def chip(tpu_mlir, tmp_path_factory):
    """(form, scheme) -> what the simulator makes of x; `one` is the fused form, `chain` the spelt one."""
    folder = tmp_path_factory.mktemp("gelu")
    template = write(folder / "template.onnx")
    fill(template, {"x"}, lambda slot: np.zeros(0), folder / "one.onnx", (fuse_tanh_gelu,))
    graphs = {"one": folder / "one.onnx", "chain": template}
    x = (np.random.default_rng(0).standard_normal(SHAPE) * 2).astype(np.float32)
    x = torch.from_numpy(x).bfloat16().half().float().numpy()  # exact in every type

    def make(case):
        form, scheme = case
        work = folder / f"{form}-{scheme}"
        work.mkdir()
        job = CompileJob("gelu", graphs[form], template, frozenset({"x"}), parse_scheme(scheme), "bm1684x")
        return compile_graph(tpu_mlir, job, work, work / "log")

    cases = [(form, scheme) for form in graphs for scheme in SCHEMES]
    with ThreadPoolExecutor(2) as pool:
        compiled = dict(zip(cases, pool.map(make, cases), strict=True))
    with Simulator(tpu_mlir, "bm1684x", folder / "simulator.log") as simulator:
        results = {case: simulator.run(one.bmodel, {"x": x}, ("y",))["y"] for case, one in compiled.items()}
    exact = torch.nn.functional.gelu(torch.from_numpy(x).double(), approximate="tanh").numpy()
    return compiled, {
        case: float(np.linalg.norm(made - exact) / np.linalg.norm(exact)) for case, made in results.items()
    }


@pytest.mark.tpu_mlir
def test_one_operation_is_exact_where_the_chain_is_not(chip):
    compiled, errors = chip
    for scheme in SCHEMES:
        assert '"tpu.Active"' in compiled["one", scheme].lowered.read_text()
        # computed in F32 whatever the scheme: what enters and leaves it is all that is rounded
        assert errors["one", scheme] <= 1e-6
    assert errors["chain", "F16"] > 1e-4
    assert errors["chain", "BF16"] > 1e-3


@pytest.mark.tpu_mlir
@pytest.mark.parametrize("name", ["bm1688", "bm1684x2"])
def test_simulators_of_other_chips_run(tpu_mlir, tmp_path, name):
    """Each with the runtime that is its own: a BM1684X2's ends with another's."""
    template = write(tmp_path / "template.onnx")
    fill(template, {"x"}, lambda slot: np.zeros(0), tmp_path / "one.onnx", (fuse_tanh_gelu,))
    (work := tmp_path / "work").mkdir()
    job = CompileJob("gelu", tmp_path / "one.onnx", template, frozenset({"x"}), parse_scheme("BF16"), name)
    made = compile_graph(tpu_mlir, job, work, work / "log")
    x = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    with Simulator(tpu_mlir, name, work / "simulator.log") as simulator:
        y = simulator.run(made.bmodel, {"x": x}, ("y",))["y"]
    exact = torch.nn.functional.gelu(torch.from_numpy(x).double(), approximate="tanh").numpy()
    assert np.linalg.norm(y - exact) <= 1e-5 * np.linalg.norm(exact)


@pytest.mark.tpu_mlir
def test_another_chip_is_told_to_compute_it_in_float32(tpu_mlir, tmp_path):
    """A bm1688 would do it in 16 bits: of what is below -1 a third is lost."""
    template = write(tmp_path / "template.onnx")
    fill(template, {"x"}, lambda slot: np.zeros(0), tmp_path / "one.onnx", (fuse_tanh_gelu,))
    x = torch.linspace(-4, 4, int(np.prod(SHAPE))).reshape(SHAPE).bfloat16().float()
    exact, small = torch.nn.functional.gelu(x.double(), approximate="tanh").numpy(), x.numpy() < -1

    def off(narrow):
        (work := tmp_path / str(narrow)).mkdir()
        job = CompileJob("gelu", tmp_path / "one.onnx", template, frozenset({"x"}), parse_scheme("BF16"), "bm1688",
                         narrow_gelus=narrow)  # fmt: skip
        made = compile_graph(tpu_mlir, job, work, work / "log")
        with Simulator(tpu_mlir, "bm1688", work / "simulator.log") as simulator:
            y = simulator.run(made.bmodel, {"x": x.numpy()}, ("y",))["y"]
        return float(np.linalg.norm((y - exact)[small]) / np.linalg.norm(exact[small])), made.lowered.read_text()

    error, text = off(False)
    assert error <= 1e-4
    error, narrow = off(True)
    assert error > 0.1
    adapter.check_gelus(1, text, "gelu")
    with pytest.raises(adapter.CompileError, match="gelu: 1 of 1 tanh GELUs are computed in 16 bits, which lose"):
        adapter.check_gelus(1, narrow, "gelu")


@pytest.mark.tpu_mlir
def test_a_gelu_that_the_compiler_takes_apart_is_caught(chip):
    compiled, _ = chip
    text = compiled["one", "BF16"].lowered.read_text()
    adapter.check_gelus(1, text, "gelu")
    with pytest.raises(adapter.CompileError, match="gelu: 0 of 1 tanh GELUs became one operation"):
        adapter.check_gelus(1, text.replace("TGELU", "GELU"), "gelu")
