"""The order of a block's operations: what no token depends on first, and kept by the compiler."""

from __future__ import annotations

import re

import onnx_ir as ir
import pytest

from fluxkiln.compile.onnx.filled import fill
from fluxkiln.compile.toolchains.tpu_mlir.coefficients import probe_reader
from fluxkiln.compile.toolchains.tpu_mlir.compiler import CompileJob, compile_graph
from fluxkiln.compile.toolchains.tpu_mlir.graphs import TOKEN_INPUTS, small_work_first
from fluxkiln.quantize.schemes import parse_scheme


def reached_by_tokens(model):
    """For each node in order whether a token input reaches it, and a check that producers precede consumers."""
    known = {value.name for value in (*model.graph.inputs, *model.graph.initializers.values())}
    reached = {name for name in known if name in TOKEN_INPUTS}
    flags = []
    for node in model.graph:
        names = [value.name for value in node.inputs if value is not None]
        assert set(names) <= known, f"{node.name} stands before what it reads"
        flags.append(any(name in reached for name in names))
        known.update(value.name for value in node.outputs)
        if flags[-1]:
            reached.update(value.name for value in node.outputs)
    return flags


@pytest.mark.parametrize("kind", ["single", "double", "double_modulated", "tail"])
def test_what_no_token_reaches_comes_first(tiny_template, kind):
    model = ir.load(tiny_template(kind, "onnx17").path)
    before = [node.outputs[0].name for node in model.graph]
    small_work_first(model)
    flags = reached_by_tokens(model)
    assert flags == sorted(flags)
    assert 0 < sum(flags) < len(flags)
    # nothing is lost, and neither half has changed its own order
    after = [node.outputs[0].name for node in model.graph]
    assert sorted(after) == sorted(before)
    for half in (after[: flags.index(True)], after[flags.index(True) :]):
        assert half == [name for name in before if name in set(half)]


def test_without_token_inputs_nothing_moves(tiny_template):
    model = ir.load(tiny_template("clip", "onnx17").path)
    before = [node.outputs[0].name for node in model.graph]
    small_work_first(model)
    assert [node.outputs[0].name for node in model.graph] == before


@pytest.mark.tpu_mlir
@pytest.mark.parametrize("ordered", [True, False])
def test_norm_factor_and_shift_share_one_pass(tiny_template, tpu_mlir, tmp_path, ordered):
    """Only with our order are the three one group; the control is the order that the compiler itself chooses."""
    template = tiny_template("double_modulated", "onnx17")
    activations = frozenset(spec.name for spec in template.inputs)
    fill(template.path, set(activations), probe_reader(template.slots), tmp_path / "filled.onnx", (small_work_first,))
    work = tmp_path / "work"
    work.mkdir()
    job = CompileJob(
        "block", tmp_path / "filled.onnx", template.path, activations, parse_scheme("BF16"),
        "bm1684x", narrow_inputs=True, narrow_outputs=True, ordered=ordered,
    )  # fmt: skip
    compile_graph(tpu_mlir, job, work, tmp_path / "log")
    (final,) = work.glob("*_final.mlir")
    groups = re.findall(r"tpu\.Group.*?tpu\.Yield", final.read_text(), re.DOTALL)
    grouped = sum(group.count('"tpu.LayerNorm"') for group in groups if '"tpu.Mul"' in group and '"tpu.Add"' in group)
    assert (grouped == 4) == ordered
