"""The interpreter's graph in little memory: to the bit what the compiler's own graph computes."""

from __future__ import annotations

import re

import numpy as np
import pytest

from fluxkiln.compile.templates import make_template
from fluxkiln.compile.toolchains.tpu_mlir.compiler import weight_file
from fluxkiln.compile.toolchains.tpu_mlir.executors import Simulator
from fluxkiln.compile.toolchains.tpu_mlir.graphs import lean_graph
from fluxkiln.compile.toolchains.tpu_mlir.moulds import compile_part
from fluxkiln.compile.toolchains.tpu_mlir.simulator_worker import inputs_first
from fluxkiln.errors import CompileError
from fluxkiln.patches.flux1.kinds import KINDS
from fluxkiln.types import Shapes, find_part

SMALLEST = Shapes(height=32, width=32, tokens=16)
# softmax(query @ key) @ value of 4 heads, as the compiler writes it
ATTENTION = """module @m attributes {{module.weight_file = "w.npz"}} {{
  func.func @main(%arg0: tensor<1x4x6x8xf32> loc(unknown), %arg1: tensor<1x4x8x6xf32> loc(unknown)) {{
    %0 = "top.None"() : () -> none loc(#loc)
    %1 = "top.Input"(%arg0) {{do_preprocess = true}} : (tensor<1x4x6x8xf32>) -> tensor<1x4x6x8xf32> loc(#loc1)
    %2 = "tpu.Cast"(%1) {{with_scale = true}} : (tensor<1x4x6x8xf32>) -> tensor<1x4x6x8xbf16> loc(#loc2)
    %3 = "top.Input"(%arg1) {{do_preprocess = true}} : (tensor<1x4x8x6xf32>) -> tensor<1x4x8x6xf32> loc(#loc3)
    %4 = "tpu.Cast"(%3) {{with_scale = true}} : (tensor<1x4x8x6xf32>) -> tensor<1x4x8x6xbf16> loc(#loc4)
    %5 = "tpu.MatMul"(%2, %4, %0, %0, %0) {{round_mode = #tpu<round_mode HalfAwayFromZero>}} : (tensor<1x4x6x8xbf16>, tensor<1x4x8x6xbf16>, none, none, none) -> tensor<1x4x6x6xbf16> loc(#loc5)
    %6 = "tpu.Softmax"(%5, %0) {{axis = 3 : si32}} : (tensor<1x4x6x6xbf16>, none) -> tensor<1x4x6x6xbf16> loc(#loc6)
    %7 = "tpu.MatMul"(%6, %2, %0, %0, %0) {{}} : (tensor<1x4x6x6xbf16>, tensor<1x4x6x8xbf16>, none, none, none) -> tensor<1x4x6x8xbf16> loc(#loc7)
{extra}    return %7 : tensor<1x4x6x8xbf16> loc(#loc)
  }} loc(#loc)
}} loc(#loc)
"""  # noqa: E501


def attention(extra=""):
    return ATTENTION.format(extra=extra)


def operations(text):
    return re.findall(r'= "(?:top|tpu)\.(\w+)"', text)


def test_inputs_are_declared_first():
    lean = lean_graph(attention())
    assert operations(lean)[:3] == ["Input", "Input", "None"]
    assert sorted(lean.splitlines()) == sorted(attention().splitlines())
    assert lean_graph(lean) == lean


@pytest.mark.parametrize(("most", "groups"), [(144, 1), (143, 2), (72, 2), (71, 4), (1, 4)])
def test_attention_is_grouped_by_heads(most, groups):
    lean = lean_graph(attention(), most)
    assert operations(lean).count("Softmax") == groups
    assert operations(lean).count("MatMul") == 2 * groups
    assert operations(lean).count("Slice") == (3 * groups if groups > 1 else 0)
    if groups > 1:
        assert f"tensor<1x{4 // groups}x6x6xbf16>" in lean
        assert "tensor<1x4x6x6xbf16>" not in lean
        spans = re.findall(r"ends = \[1, (\d), 6, 8\].*offset = \[0, (\d), 0, 0\]", lean)
        assert [(int(start), int(stop)) for stop, start in spans[::2]] == [
            (group * 4 // groups, (group + 1) * 4 // groups) for group in range(groups)
        ]


@pytest.mark.parametrize(
    "other_use",
    [
        '    %8 = "tpu.Active"(%5) {mode = 1} : (tensor<1x4x6x6xbf16>) -> tensor<1x4x6x6xbf16> loc(#loc8)\n',
        '    %8 = "tpu.Active"(%6) {mode = 1} : (tensor<1x4x6x6xbf16>) -> tensor<1x4x6x6xbf16> loc(#loc8)\n',
    ],
)
def test_scores_with_another_use_are_left_alone(other_use):
    assert operations(lean_graph(attention(other_use), 1)).count("Softmax") == 1


def test_what_is_no_lowered_graph_is_refused():
    with pytest.raises(CompileError, match="has no function main"):
        lean_graph("module @m {\n}\n")


@pytest.mark.tpu_mlir
@pytest.mark.parametrize("scheme", ["W4BF16", "F16"])
@pytest.mark.parametrize("kind", ["clip", "t5_embed", "t5_block", "t5_final", "head", "double", "single", "tail"])
def test_every_kind_computes_the_same_to_the_bit(small_build, tpu_mlir, part_of_kind, tmp_path, kind, scheme):
    made, original, lean = run_both(small_build(scheme=scheme), tpu_mlir, part_of_kind, tmp_path, kind)
    assert not inputs_first(original) or len(KINDS[kind].inputs) == 1
    assert inputs_first(lean)
    for output, (expected, found) in made.items():
        np.testing.assert_array_equal(found, expected, err_msg=output)


@pytest.mark.tpu_mlir
def test_every_vae_computes_the_same_to_the_bit(small_build, tpu_mlir, part_of_kind, tmp_path):
    made, _, _ = run_both(small_build(), tpu_mlir, part_of_kind, tmp_path, "vae_decoder")
    for expected, found in made.values():
        np.testing.assert_array_equal(found, expected)


def run_both(small_build, tpu_mlir, part_of_kind, folder, kind):
    """Output -> what the compiler's own graph makes and what the lean one makes, a head at a time."""
    part, recording = part_of_kind(kind, SMALLEST)
    binary = compile_part(
        *small_build, find_part(small_build.parts, part.name), make_template(*small_build, kind, "onnx17")
    )
    text = small_build.cache.path(binary.blobs["lowered"]).read_text()
    paths = {}
    for name, graph in (("original", text), ("lean", lean_graph(text, 1))):
        (folder / name).mkdir()
        paths[name] = folder / name / "graph.mlir"
        paths[name].write_text(graph)
        (folder / name / weight_file(text)).write_bytes(small_build.cache.path(binary.blobs["weights"]).read_bytes())
    assert ("heads" in paths["lean"].read_text()) == (kind in ("double", "single"))
    inputs, outputs = recording.inputs(part.name), KINDS[kind].outputs
    with Simulator(tpu_mlir, "bm1684x", folder / "log") as interpreter:
        original, lean = (interpreter.run(path, inputs, outputs) for path in paths.values())
    return {name: (original[name], lean[name]) for name in outputs}, *paths.values()
