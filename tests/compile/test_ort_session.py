"""Sessions: opened late, closed early, strict about names and shapes, clear about damaged files; poured graphs too."""

from __future__ import annotations

import os

import numpy as np
import pytest

from fluxkiln.compile.ort_graph import external_files
from fluxkiln.compile.ort_session import OrtRunner, open_session
from fluxkiln.compile.pour import pour, quantized_matmuls
from fluxkiln.errors import CompileError, IntegrityError
from fluxkiln.export.bindings import bind_part, weight_reader
from fluxkiln.quantize.schemes import parse_scheme
from fluxkiln.quantize.stored import stored_weight

PARITY = 5e-6


def worst(found, expected):
    assert found.keys() == expected.keys()
    return max(
        np.linalg.norm(found[name] - values) / np.linalg.norm(values.astype(np.float64))
        for name, values in expected.items()
    )


def test_least_recently_used_sessions_are_closed(link, tiny_recording):
    names = ("t5_final", "head", "tail")
    recording = tiny_recording()
    runner = OrtRunner({name: link(name) for name in names}, most_open=2)
    assert runner.open_parts == ()
    for name in ("t5_final", "head", "t5_final"):
        runner(name, recording.inputs(name))
    assert runner.open_parts == ("head", "t5_final")
    runner("tail", recording.inputs("tail"))
    assert runner.open_parts == ("t5_final", "tail")
    first = runner("head", recording.inputs("head"))
    runner.close()
    assert runner.open_parts == ()
    assert worst(runner("head", recording.inputs("head")), first) == 0


def test_leaving_the_block_closes(link, tiny_recording):
    with OrtRunner({"tail": link("tail")}) as runner:
        runner("tail", tiny_recording().inputs("tail"))
        assert runner.open_parts == ("tail",)
    assert runner.open_parts == ()


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("threads", [1, 2])
def test_settings_do_not_change_the_result(link, tiny_recording, lean, threads):
    recording = tiny_recording()
    with OrtRunner({"single.00": link("single.00")}, threads=threads, lean=lean) as runner:
        assert worst(runner("single.00", recording.inputs("single.00")), recording.outputs("single.00")) <= PARITY


def test_inputs_may_come_in_other_dtypes_and_layouts(link, tiny_recording):
    recording = tiny_recording()
    with OrtRunner({name: link(name) for name in ("clip", "tail")}) as runner:
        ids = recording.inputs("clip")["input_ids"]
        expected = runner("clip", {"input_ids": ids.astype(np.int64)})
        assert worst(runner("clip", {"input_ids": ids.astype(np.int32)}), expected) == 0
        inputs = recording.inputs("tail")
        strided = {name: np.asfortranarray(values.astype(np.float64)) for name, values in inputs.items()}
        assert worst(runner("tail", strided), runner("tail", inputs)) == 0


def test_wrong_requests_are_refused(link, tiny_recording):
    inputs = tiny_recording().inputs("tail")
    with OrtRunner({"tail": link("tail")}) as runner:
        with pytest.raises(CompileError, match="tail"):
            runner("head", inputs)
        with pytest.raises(CompileError, match="temb is missing"):
            runner("tail", {"hidden_states": inputs["hidden_states"]})
        with pytest.raises(CompileError, match="guidance is missing or one too many"):
            runner("tail", {**inputs, "guidance": inputs["temb"]})
        with pytest.raises(CompileError, match=r"\[1, 16, 256\]"):
            runner("tail", {**inputs, "hidden_states": inputs["hidden_states"][:, :8]})


def test_ids_beyond_the_vocabulary_are_an_error_with_the_part_in_it(link):
    with OrtRunner({"t5_embed": link("t5_embed")}) as runner, pytest.raises(CompileError, match="t5_embed"):
        runner("t5_embed", {"input_ids": np.full((1, 32), 10**6)})


@pytest.mark.parametrize("scheme", ["F32", "W4BF16"])
def test_truncated_weights_are_an_integrity_error(link, scheme):
    graph = link("single.00", scheme)
    file, needed = next(iter(external_files(graph).items()))
    copy = file.read_bytes()
    os.unlink(file)  # a hard link: the checkpoint itself must stay whole
    file.write_bytes(copy[: needed - 1])
    with pytest.raises(IntegrityError, match=f"has {needed - 1} bytes"):
        open_session(graph)
    file.write_bytes(copy[:needed])
    open_session(graph)


def test_missing_files_are_an_integrity_error(link, tmp_path):
    graph = link("tail")
    for file in external_files(graph):
        file.unlink()
    with pytest.raises(IntegrityError, match="does not exist"):
        open_session(graph)
    with pytest.raises(IntegrityError, match="does not exist"):
        open_session(tmp_path / "nothing.onnx")


def test_what_is_no_graph_is_an_integrity_error(tmp_path):
    (tmp_path / "no.onnx").write_bytes(b"no graph at all")
    with pytest.raises(IntegrityError, match=r"no\.onnx is no ONNX graph"):
        open_session(tmp_path / "no.onnx")


def test_a_graph_that_cannot_run_is_a_compile_error(link):
    import onnx

    graph = link("tail")
    model = onnx.load(graph, load_external_data=False)
    model.graph.node[0].op_type = "Unheard"
    onnx.save(model, graph)
    with pytest.raises(CompileError, match="Unheard"):
        open_session(graph)


@pytest.fixture
def poured(tiny_checkpoint, tiny_template, tiny_parts, tmp_path):
    """(part, scheme, slots that stay as they are) -> its opset 17 graph with the weights as the scheme stores them."""

    def make(name, scheme, untouched=()):
        part, checkpoint = tiny_parts(name), tiny_checkpoint()
        template = tiny_template(part.kind, "onnx17")
        activations = {spec.name for spec in template.inputs}
        quantized = {slot for slot, _ in quantized_matmuls(template.path, activations)}
        reader = weight_reader(bind_part(part, template.slots, checkpoint), checkpoint)

        def stored(slot):
            weight = reader(slot)
            if slot.startswith(untouched):
                return weight
            return stored_weight(weight, parse_scheme(scheme), slot in quantized)

        target = tmp_path / f"{name}-{scheme}-{len(untouched)}.onnx"
        pour(template.path, activations, stored, target)
        return target

    return make


@pytest.mark.parametrize(
    "name", ["clip", "t5_embed", "t5_block.00", "t5_final", "head", "double.00", "single.00", "tail", "vae_decoder"]
)
def test_poured_graphs_equal_the_reference(name, poured, tiny_recording):
    recording = tiny_recording()
    with OrtRunner({name: poured(name, "F32")}) as runner:
        assert worst(runner(name, recording.inputs(name)), recording.outputs(name)) <= PARITY


@pytest.mark.parametrize("scheme", ["W4BF16", "W4BF16-g32", "W8BF16"])
@pytest.mark.parametrize("name", ["double.00", "single.00", "t5_block.00"])
def test_dequantized_reference_equals_the_quantized_graph(name, scheme, poured, link, tiny_recording):
    """Two ways to the same numbers: opset 17 with dequantized weights, opset 23 with codes.

    The norm weights of q and k have the softmax scale in them, and the chip rounds their product, the linked graph the
    norm weights alone. Nothing else differs.
    """
    inputs = tiny_recording().inputs(name)
    models = {"as stored": poured(name, scheme), "linked": link(name, scheme)}
    models["but norms"] = poured(name, scheme, untouched=("attn.norm_",))
    with OrtRunner(models) as runner:
        results = {model: runner(model, inputs) for model in models}
    assert worst(results["linked"], results["but norms"]) <= PARITY
    assert worst(results["linked"], results["as stored"]) <= 1e-3
