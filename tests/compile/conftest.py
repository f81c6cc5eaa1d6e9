"""Templates of the tiny model and graphs linked to its weights, made once a session."""

from __future__ import annotations

import functools
import os
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from fluxkiln.compile.onnx.link import link_weights
from fluxkiln.export.bindings import bind_part, binding_refs, weight_reader
from fluxkiln.export.trace import export_template
from fluxkiln.patches.flux1.kinds import list_parts
from fluxkiln.patches.flux1.model import MODEL
from fluxkiln.quantize.schemes import parse_scheme
from fluxkiln.types import Shapes, find_part

SHAPES = Shapes(height=64, width=64, tokens=32)
SMALLEST = Shapes(height=32, width=32, tokens=16)


@pytest.fixture(scope="session")
def tiny_template(tiny_checkpoint, tmp_path_factory):
    """(kind, format) -> template of tiny-dev."""

    @functools.cache
    def make(kind, graph_format):
        folder = tmp_path_factory.mktemp(f"{kind}-{graph_format}")
        return export_template(MODEL, kind, tiny_checkpoint().configs, SHAPES, graph_format, folder)

    return make


@pytest.fixture(scope="session")
def tiny_parts(tiny_checkpoint):
    """The parts of tiny-dev by name, with both decoders."""
    configs = tiny_checkpoint().configs
    parts = {part.name: part for vae in ("kl", "tiny") for part in list_parts(configs, vae)}
    return lambda name: find_part(tuple(parts.values()), name)


@pytest.fixture
def link(tiny_checkpoint, tiny_template, tiny_parts, tmp_path):
    """(part, scheme, the part whose weights it gets) -> linked graph in `tmp_path`, with hard links to the shards."""

    def make(name, scheme="F32", weights_of=None, folder=tmp_path, graph_format="onnx23"):
        checkpoint, part = tiny_checkpoint(), tiny_parts(weights_of or name)
        template = tiny_template(part.kind, graph_format)
        binding = bind_part(part, template.slots, checkpoint)
        refs = {}
        for ref in binding_refs(binding, checkpoint):
            beside = folder / binding.component / ref.file.name
            beside.parent.mkdir(parents=True, exist_ok=True)
            if not beside.exists():
                os.link(ref.file, beside)
            refs[ref.name] = replace(ref, file=beside)
        reader = weight_reader(binding, checkpoint)
        return link_weights(template, binding, refs, reader, parse_scheme(scheme), folder / f"{name}.onnx")

    return make


@pytest.fixture(scope="session")
def compile_matmul(tpu_mlir, tmp_path_factory):
    """(width, scheme, rows, CompileJob fields) -> job, result and weight of one matmul [8, width] x [width, rows]."""

    @functools.cache
    def make(width=128, scheme="F32", rows=64, chip="bm1684x", **fields):
        from fluxkiln.compile.onnx.filled import fill
        from fluxkiln.compile.toolchains.tpu_mlir.compiler import CompileJob, compile_graph

        folder = tmp_path_factory.mktemp(f"matmul-{width}-{scheme}")
        weight = np.random.default_rng(width).standard_normal((rows, width)).astype(np.float32)
        template = write_matmul(folder / "template.onnx", width, rows)
        fill(template, {"x"}, lambda slot: weight, folder / "filled.onnx")
        work = folder / "work"
        work.mkdir()
        job = CompileJob(
            "matmul", folder / "filled.onnx", template, frozenset({"x"}), parse_scheme(scheme), chip,
            **fields,
        )  # fmt: skip
        return job, compile_graph(tpu_mlir, job, work, folder / "log"), weight

    return make


@pytest.fixture(scope="session")
def compile_kind(tpu_mlir, tiny_checkpoint, tiny_template, tiny_parts, tmp_path_factory):
    """(kind, scheme, seed) -> what the compiler makes of a kind of tiny-dev, and the weights that went in.

    With seed None these are the checkpoint's own of the kind's last part, else probe weights.
    """

    @functools.cache
    def make(kind, scheme, seed=None):
        from fluxkiln.compile.onnx.filled import fill
        from fluxkiln.compile.targets.bm1684x import TARGET
        from fluxkiln.compile.toolchains.tpu_mlir.coefficients import probe_reader
        from fluxkiln.compile.toolchains.tpu_mlir.compiler import CompileJob, compile_graph
        from fluxkiln.compile.toolchains.tpu_mlir.gelu import fuse_tanh_gelu
        from fluxkiln.compile.toolchains.tpu_mlir.graphs import small_work_first

        folder, template = tmp_path_factory.mktemp(f"{kind}-{scheme}"), tiny_template(kind, "onnx17")
        if seed is None:
            part = tiny_parts({"t5_block": "t5_block.01", "double": "double.01", "single": "single.02"}.get(kind, kind))
            read = weight_reader(bind_part(part, template.slots, tiny_checkpoint()), tiny_checkpoint())
        else:
            read = probe_reader(template.slots, seed)
        activations = frozenset(spec.name for spec in template.inputs)
        rewrites = (fuse_tanh_gelu, small_work_first)
        fill(template.path, set(activations), read, folder / "filled.onnx", rewrites)
        (folder / "work").mkdir()
        job = CompileJob(
            f"{kind}_00", folder / "filled.onnx", template.path, activations, parse_scheme(scheme), TARGET.chip,
            *TARGET.narrows(MODEL.kinds[kind]),
        )  # fmt: skip
        return compile_graph(tpu_mlir, job, folder / "work", folder / "log"), read

    return make


def write_matmul(path, width, rows=64):
    """A template: x [1, 8, width] times slot w__t."""
    shapes = {"x": [1, 8, width], "w__t": [width, rows], "y": [1, 8, rows]}
    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()}
    node = helper.make_node("MatMul", ["x", "w__t"], ["y"])
    graph = helper.make_graph([node], "matmul", [values["x"], values["w__t"]], [values["y"]])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture(scope="module")
def opened(small_build, tiny_recording):
    """(part, scheme, target) -> the part looked into as its toolchain does, on its second step, and its build."""
    from fluxkiln.compile.toolchains.onnxruntime.look import open_linked
    from fluxkiln.compile.toolchains.tpu_mlir.rungs import open_stored

    recording = tiny_recording("tiny-dev", "kl", SMALLEST)

    def make(name, scheme="W4BF16,tail=W4BF16", target="bm1684x"):
        made = small_build(scheme=scheme, target=target)
        look = open_linked if target == "cpu" else open_stored
        return look(*made, find_part(made.parts, name), recording.inputs(name, 1)), made

    return make
