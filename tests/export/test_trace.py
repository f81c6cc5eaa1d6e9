"""Templates: static shapes, weights as inputs, and the function of the module they were traced from."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from fluxkiln.compile.onnx.filled import fill
from fluxkiln.errors import UsageError
from fluxkiln.export.bindings import bind_part, weight_reader
from fluxkiln.export.trace import export_template
from fluxkiln.patches.flux1.inputs import part_inputs
from fluxkiln.patches.flux1.kinds import KINDS, MODULATION_ROWS
from fluxkiln.patches.flux1.model import MODEL
from fluxkiln.patches.pipeline import run_rows
from fluxkiln.types import Shapes

SMALLEST = Shapes(height=32, width=32, tokens=16)
BLOCKS = ("t5_block", "double", "single", "tail", "double_modulation", "double_modulated", "single_modulated")


@pytest.fixture(scope="module")
def template(tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("templates")
    made = {}

    def make(kind, graph_format="onnx17"):
        if (kind, graph_format) not in made:
            made[kind, graph_format] = export_template(
                MODEL, kind, tiny_checkpoint().configs, SMALLEST, graph_format, folder
            )
        return made[kind, graph_format]

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_template_holds_no_weights_and_static_shapes(template, kind):
    made = template(kind)
    model = onnx.load(made.path)
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == 17
    names = [value.name for value in model.graph.input]
    assert names == [spec.name for spec in (*made.inputs, *made.slots)]
    for value in (*model.graph.input, *model.graph.output):
        assert all(dim.dim_value > 0 for dim in value.type.tensor_type.shape.dim), value.name
    assert sum(len(tensor.raw_data) for tensor in model.graph.initializer) < 1 << 19
    assert "/fluxkiln" not in made.path.read_bytes().decode("latin1")  # no path of this machine
    onnx.checker.check_model(model)


@pytest.mark.parametrize("kind", KINDS)
def test_poured_template_computes_the_reference(template, tiny_checkpoint, part_of_kind, tmp_path, kind):
    part, recording = part_of_kind(kind, SMALLEST)
    checkpoint, made = tiny_checkpoint(), template(kind)
    reader = weight_reader(bind_part(part, made.slots, checkpoint), checkpoint)
    fill(made.path, {spec.name for spec in made.inputs}, reader, tmp_path / "filled.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "filled.onnx", providers=["CPUExecutionProvider"])
    outputs = KINDS[kind].outputs
    results = run_rows(
        lambda _, inputs: dict(zip(outputs, session.run(None, inputs), strict=True)), part, recording.inputs(part.name)
    )
    for name, result in results.items():
        expected = recording.outputs(part.name)[name]
        assert np.linalg.norm(result.reshape(expected.shape) - expected) / np.linalg.norm(expected) <= 5e-6


def test_tracing_again_gives_the_same_bytes(template, tiny_checkpoint, tmp_path):
    for kind in BLOCKS:
        again = export_template(MODEL, kind, tiny_checkpoint().configs, SMALLEST, "onnx17", tmp_path)
        assert again.digest == template(kind).digest


def test_other_shapes_are_another_template(template, tiny_checkpoint, tmp_path):
    other = export_template(MODEL, "tail", tiny_checkpoint().configs, Shapes(48, 32, 16), "onnx17", tmp_path)
    assert other.inputs[0].shape == (1, 6, 256)
    assert other.digest != template("tail").digest


@pytest.mark.parametrize("graph_format", ["pt2", "torchscript"])
def test_pt_templates_run(template, tiny_checkpoint, graph_format):
    made = template("tail", graph_format)
    module = torch.export.load(made.path).module() if graph_format == "pt2" else torch.jit.load(str(made.path))
    random = torch.Generator().manual_seed(0)
    arguments = [torch.randn(spec.shape, generator=random) for spec in (*made.inputs, *made.slots)]
    hidden, temb, weight, bias, out_weight, out_bias = arguments
    scale, shift = torch.nn.functional.linear(torch.nn.functional.silu(temb), weight, bias).chunk(2, dim=-1)
    normed = torch.nn.functional.layer_norm(hidden, hidden.shape[-1:], eps=1e-6)
    expected = torch.nn.functional.linear(normed * (1 + scale) + shift, out_weight, out_bias)
    assert torch.linalg.norm(module(*arguments) - expected) / torch.linalg.norm(expected) < 1e-5


def test_inputs_are_declared_in_the_kinds_order(tiny_checkpoint):
    for preset in ("tiny-dev", "tiny-schnell"):
        configs = tiny_checkpoint(preset).configs
        for kind, declared in KINDS.items():
            names = [spec.name for spec in part_inputs(kind, configs, SMALLEST)]
            wanted = [name for name in declared.inputs if preset == "tiny-dev" or name != "guidance"]
            assert names == wanted


def test_hoisted_kinds_take_all_steps_and_the_others_one(tiny_checkpoint):
    """Rows are static: they are in the inputs, and so in the key under which a template is kept."""
    configs = tiny_checkpoint().configs
    for kind, declared in KINDS.items():
        shapes = {spec.name: spec.shape for spec in part_inputs(kind, configs, SMALLEST)}
        for name in declared.rows:
            assert shapes[name][0] == MODULATION_ROWS, (kind, name)
        for name in shapes.keys() & {"temb", "modulation", "timestep", "guidance"} - set(declared.rows):
            assert shapes[name][0] == 1, (kind, name)
    widths = {kind: part_inputs(f"{kind}_modulated", configs, SMALLEST) for kind in ("double", "single", "tail")}
    found = {kind: next(spec.shape for spec in specs if spec.name == "modulation") for kind, specs in widths.items()}
    assert found == {"double": (1, 12, 256), "single": (1, 3, 256), "tail": (1, 2, 256)}


def test_unknown_kinds_and_formats_are_refused(tiny_checkpoint, tmp_path):
    configs = tiny_checkpoint().configs
    with pytest.raises(UsageError, match=r"'tripel'; there are clip, t5_embed"):
        export_template(MODEL, "tripel", configs, SMALLEST, "onnx17", tmp_path)
    with pytest.raises(UsageError, match=r"no graph format is called 'onnx18'; there are onnx17, onnx23, pt2"):
        export_template(MODEL, "tail", configs, SMALLEST, "onnx18", tmp_path)
    assert not list(tmp_path.iterdir())
