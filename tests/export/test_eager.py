"""Patched parts replay the recording within float rounding; what a wrong patch or weight does is caught by the gate."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fluxkiln.errors import CheckpointError, ParityError, PatchError, UsageError
from fluxkiln.export import bindings, eager
from fluxkiln.export.eager import PatchedRunner
from fluxkiln.patches.flux1 import transformer as patches
from fluxkiln.patches.flux1.kinds import list_parts
from fluxkiln.patches.pipeline import run_rows
from fluxkiln.types import TensorRef
from fluxkiln.verify.ladder import Ladder, explain_failure

CASES = [("tiny-dev", "kl", "onnx17"), ("tiny-dev", "tiny", "onnx23"), ("tiny-schnell", "kl", "onnx17")]
LARGEST = 1e-6


def compare(recording, run, parts):
    """Every output of every call of `parts` at the rung `patched`."""
    ladder = Ladder()
    for part in parts:
        kind = part.traits
        for step in range(len(recording.calls[part.name])):
            inputs, expected = recording.inputs(part.name, step), recording.outputs(part.name, step)
            actual = run_rows(run, part, inputs)
            assert tuple(actual) == kind.outputs
            for output in kind.outputs:
                base = inputs[dict(kind.residual)[output]] if output in dict(kind.residual) else None
                rungs = [("patched", actual[output])]
                ladder.compare(part.name, kind, output, step, expected[output], base, rungs)
    return ladder


@pytest.fixture
def model(tiny_checkpoint, tiny_recording):
    """Checkpoint, parts and recording of tiny-dev."""
    checkpoint = tiny_checkpoint()
    return checkpoint, list_parts(checkpoint.configs), tiny_recording()


@pytest.mark.parametrize(("preset", "vae", "graph_format"), CASES)
def test_every_part_equals_the_reference(tiny_checkpoint, tiny_recording, preset, vae, graph_format):
    checkpoint = tiny_checkpoint(preset)
    parts = list_parts(checkpoint.configs, vae)
    ladder = compare(tiny_recording(preset, vae), PatchedRunner(checkpoint, parts, graph_format), parts)
    ladder.raise_if_failed("none")
    assert len(ladder.rows) == 5 + 2 * (3 + 2 * 2 + 3 + 1) + 1
    for row in ladder.rows:
        assert row.vs_reference.relative_l2 <= LARGEST, row.part
        assert row.vs_reference.delta_relative_l2 is None or row.vs_reference.delta_relative_l2 <= LARGEST, row.part


@pytest.mark.parametrize(("preset", "graph_format"), [("tiny-dev", "onnx17"), ("tiny-schnell", "onnx23")])
def test_every_hoisted_part_equals_the_reference(tiny_checkpoint, hoisted_recording, preset, graph_format):
    checkpoint = tiny_checkpoint(preset)
    parts = list_parts(checkpoint.configs, modulation="hoisted")
    ladder = compare(hoisted_recording(preset), PatchedRunner(checkpoint, parts, graph_format), parts)
    ladder.raise_if_failed("none")
    # both steps: time embedding, modulations of 2 + 3 blocks and the tail, two streams, blocks, tail
    assert len(ladder.rows) == 5 + 2 * (1 + 6 + 2 + 2 * 2 + 3 + 1) + 1
    for row in ladder.rows:
        assert row.vs_reference.relative_l2 <= LARGEST, row.part
        assert row.vs_reference.delta_relative_l2 is None or row.vs_reference.delta_relative_l2 <= LARGEST, row.part


def test_outputs_are_float32_and_inputs_stay_as_they_are(model):
    checkpoint, parts, recording = model
    run = PatchedRunner(checkpoint, parts)
    for part in parts:
        inputs = recording.inputs(part.name)
        before = {name: array.copy() for name, array in inputs.items()}
        for array in inputs.values():
            array.setflags(write=False)
        outputs = run(part.name, inputs)
        assert {array.dtype for array in outputs.values()} == {np.dtype(np.float32)}
        for name, array in inputs.items():
            np.testing.assert_array_equal(array, before[name])


def test_few_parts_are_kept_in_memory(model, monkeypatch):
    checkpoint, parts, recording = model
    loads = []
    load = eager.load_whole

    def counted(part, checkpoint):
        loads.append(part.name)
        return load(part, checkpoint)

    monkeypatch.setattr(eager, "load_whole", counted)
    run = PatchedRunner(checkpoint, parts, keep=2)
    for name in ("tail", "single.00", "tail", "single.01", "tail", "single.00"):
        run(name, recording.inputs(name))
    # single.00 went when single.01 came, tail was used meanwhile
    assert loads == ["tail", "single.00", "single.01", "single.00"]


def test_only_a_parts_own_weights_are_read(model, monkeypatch):
    checkpoint, parts, recording = model
    read = []
    original = bindings.read_tensor

    def noted(ref: TensorRef):
        read.append(ref.name)
        return original(ref)

    monkeypatch.setattr(bindings, "read_tensor", noted)
    run = PatchedRunner(checkpoint, parts)
    run("tail", recording.inputs("tail"))
    assert sorted(read) == ["norm_out.linear.bias", "norm_out.linear.weight", "proj_out.bias", "proj_out.weight"]
    read.clear()
    run("t5_block.00", recording.inputs("t5_block.00"))
    assert read
    assert not [name for name in read if "relative_attention_bias" in name or ".block.1." in name]


def test_missing_tensor_is_named(model):
    checkpoint, parts, recording = model
    tensors = {name: dict(refs) for name, refs in checkpoint.tensors.items()}
    del tensors["transformer"]["proj_out.bias"]
    run = PatchedRunner(replace(checkpoint, tensors=tensors), parts)
    with pytest.raises(CheckpointError, match=r"has no tensor proj_out\.bias, which part tail needs"):
        run("tail", recording.inputs("tail"))


def test_unknown_part_is_named(model):
    checkpoint, parts, _ = model
    with pytest.raises(UsageError, match=r"no part is called 'double.07'"):
        PatchedRunner(checkpoint, parts)("double.07", {})


def test_changed_upstream_is_refused(model, monkeypatch):
    from diffusers.models.transformers.transformer_flux import FluxTransformerBlock

    checkpoint, parts, recording = model
    run = PatchedRunner(checkpoint, parts)
    run("double.00", recording.inputs("double.00"))
    monkeypatch.setattr(FluxTransformerBlock, "forward", lambda self, hidden_states: hidden_states)
    with pytest.raises(PatchError, match=r"double_block: .*FluxTransformerBlock.forward"):
        run("double.00", recording.inputs("double.00"))


# Negative controls: the gate sees each of these, and says where to look.


def failed_parts(ladder):
    return sorted({row.part for row in ladder.rows if not row.passed})


def test_a_patch_that_forgets_a_bias_is_caught(model, monkeypatch):
    checkpoint, parts, recording = model
    original = patches._feed_forward

    def forgetful(ff, x):
        return original(ff, x) - ff.net[2].bias

    monkeypatch.setattr(patches, "_feed_forward", forgetful)
    ladder = compare(recording, PatchedRunner(checkpoint, parts), parts)
    assert failed_parts(ladder) == ["double.00", "double.01"]
    assert "first bad rung: patched" in explain_failure(ladder.rows)
    assert "a patch that changes the arithmetic" in explain_failure(ladder.rows)
    with pytest.raises(ParityError):
        ladder.raise_if_failed("report.json")


def test_a_softmax_scale_forgotten_in_one_block_kind_is_caught(model, monkeypatch):
    checkpoint, parts, recording = model

    def unscaled(norm, x):
        from torch.nn import functional

        return functional.rms_norm(x, norm.normalized_shape, norm.weight, norm.eps)

    monkeypatch.setattr(patches, "_head_norm", unscaled)
    ladder = compare(recording, PatchedRunner(checkpoint, parts), parts)
    assert failed_parts(ladder) == ["double.00", "double.01", "single.00", "single.01", "single.02"]


def test_shift_and_scale_in_the_wrong_order_are_caught(tiny_checkpoint, hoisted_recording, monkeypatch):
    checkpoint = tiny_checkpoint()
    parts = list_parts(checkpoint.configs, modulation="hoisted")
    original = patches.modulate
    monkeypatch.setattr(patches, "modulate", lambda norm, x, rows, shift, scale: original(norm, x, rows, scale, shift))
    ladder = compare(hoisted_recording(), PatchedRunner(checkpoint, parts), parts)
    assert failed_parts(ladder) == ["double.00", "double.01", "single.00", "single.01", "single.02"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("double_modulation.00", "double_modulation.01"),
        ("single_modulation.00", "single_modulation.02"),
        ("double.00", "double.01"),
    ],
)
def test_swapped_hoisted_parts_are_caught(tiny_checkpoint, hoisted_recording, one, other):
    checkpoint = tiny_checkpoint()
    parts = list_parts(checkpoint.configs, modulation="hoisted")
    prefixes = {part.name: part.prefix for part in parts}
    prefixes[one], prefixes[other] = prefixes[other], prefixes[one]
    swapped = tuple(replace(part, prefix=prefixes[part.name]) for part in parts)
    assert failed_parts(compare(hoisted_recording(), PatchedRunner(checkpoint, swapped), swapped)) == [one, other]


@pytest.mark.parametrize(
    ("one", "other"), [("double.00", "double.01"), ("single.01", "single.02"), ("t5_block.00", "t5_block.01")]
)
def test_swapped_blocks_are_caught(model, one, other):
    checkpoint, parts, recording = model
    prefixes = {part.name: part.prefix for part in parts}
    prefixes[one], prefixes[other] = prefixes[other], prefixes[one]
    swapped = tuple(replace(part, prefix=prefixes[part.name]) for part in parts)
    ladder = compare(recording, PatchedRunner(checkpoint, swapped), parts)
    assert failed_parts(ladder) == [one, other]


def test_one_wrong_element_of_a_bias_is_caught(model):
    checkpoint, parts, recording = model
    run = PatchedRunner(checkpoint, parts)
    original = bindings.part_state

    def nudged(part, slots, checkpoint):
        state = original(part, slots, checkpoint)
        if part.name == "single.01":
            state["proj_out.bias"][3] += 0.02
        return state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eager, "part_state", nudged)
        ladder = compare(recording, run, parts)
    assert failed_parts(ladder) == ["single.01"]
