"""Sessions: opened late, closed early, strict about names and shapes, clear about damaged files."""

from __future__ import annotations

import os

import numpy as np
import pytest

from fluxkiln.compile.onnx.link import external_files
from fluxkiln.compile.onnx.session import open_session
from fluxkiln.compile.toolchains.onnxruntime.toolchain import OrtExecutor
from fluxkiln.errors import CompileError, IntegrityError

PARITY = 5e-6


def run_on(graphs, **options):
    return OrtExecutor(graphs, dict.fromkeys(graphs, "transformer"), **options)


def worst(found, expected):
    assert found.keys() == expected.keys()
    return max(
        np.linalg.norm(found[name] - values) / np.linalg.norm(values.astype(np.float64))
        for name, values in expected.items()
    )


def test_least_recently_used_sessions_are_closed(link, tiny_recording):
    names = ("t5_final", "head", "tail")
    recording = tiny_recording()
    runner = run_on({name: link(name) for name in names}, most_open=2)
    assert list(runner.sessions) == []
    for name in ("t5_final", "head", "t5_final"):
        runner(name, recording.inputs(name))
    assert list(runner.sessions) == ["head", "t5_final"]
    runner("tail", recording.inputs("tail"))
    assert list(runner.sessions) == ["t5_final", "tail"]
    first = runner("head", recording.inputs("head"))
    runner.close()
    assert list(runner.sessions) == []
    assert worst(runner("head", recording.inputs("head")), first) == 0


@pytest.mark.parametrize("spin", [True, False])
@pytest.mark.parametrize("threads", [1, 2])
def test_settings_do_not_change_the_result(link, tiny_recording, spin, threads):
    recording = tiny_recording()
    runner = run_on({"single.00": link("single.00")}, threads=threads, spin=spin)
    assert worst(runner("single.00", recording.inputs("single.00")), recording.outputs("single.00")) <= PARITY


def test_inputs_may_come_in_other_dtypes_and_layouts(link, tiny_recording):
    recording = tiny_recording()
    runner = run_on({name: link(name) for name in ("clip", "tail")})
    ids = recording.inputs("clip")["input_ids"]
    expected = runner("clip", {"input_ids": ids.astype(np.int64)})
    assert worst(runner("clip", {"input_ids": ids.astype(np.int32)}), expected) == 0
    inputs = recording.inputs("tail")
    strided = {name: np.asfortranarray(values.astype(np.float64)) for name, values in inputs.items()}
    assert worst(runner("tail", strided), runner("tail", inputs)) == 0


def test_wrong_requests_are_refused(link, tiny_recording):
    inputs = tiny_recording().inputs("tail")
    runner = run_on({"tail": link("tail")})
    with pytest.raises(CompileError, match="tail"):
        runner("head", inputs)
    with pytest.raises(CompileError, match="temb is missing"):
        runner("tail", {"hidden_states": inputs["hidden_states"]})
    with pytest.raises(CompileError, match="guidance is missing or one too many"):
        runner("tail", {**inputs, "guidance": inputs["temb"]})
    with pytest.raises(CompileError, match=r"\[1, 16, 256\]"):
        runner("tail", {**inputs, "hidden_states": inputs["hidden_states"][:, :8]})


def test_ids_beyond_the_vocabulary_are_an_error_with_the_part_in_it(link):
    runner = run_on({"t5_embed": link("t5_embed")})
    with pytest.raises(CompileError, match="t5_embed"):
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
