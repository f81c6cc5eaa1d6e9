"""The recorded reference: complete, consistent along the chain, undisturbed by being recorded, refused when damaged."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from fluxkiln.errors import CheckpointError, IntegrityError, PatchError, ResourceError, UsageError
from fluxkiln.export.checkpoint import TensorReader, open_checkpoint
from fluxkiln.patches.flux1.inputs import make_constants, part_inputs, pooled_row
from fluxkiln.patches.flux1.kinds import list_parts
from fluxkiln.patches.pipeline import PROMPT, Sampling
from fluxkiln.types import Shapes
from fluxkiln.verify import reference as module
from fluxkiln.verify.reference import read_recording, record_reference

SHAPES = Shapes(64, 64, 32)
WIDE = Shapes(height=64, width=96, tokens=24)
CASES = [("tiny-dev", "kl", SHAPES), ("tiny-dev", "tiny", WIDE), ("tiny-schnell", "kl", SHAPES)]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def case(request, tiny_checkpoint, tiny_recording):
    preset, vae, shapes = request.param
    checkpoint = tiny_checkpoint(preset)
    return checkpoint, list_parts(checkpoint.configs, vae), tiny_recording(preset, vae, shapes)


@pytest.fixture
def spoilt(tiny_recording, tmp_path):
    """A copy of a recording that a test may damage."""
    return shutil.copytree(tiny_recording().root, tmp_path / "recording")


def load_pipeline(checkpoint, vae):
    from diffusers import AutoencoderTiny, FluxPipeline

    pipe = FluxPipeline.from_pretrained(checkpoint.root, dtype=torch.float32)
    if vae == "tiny":
        pipe.vae = AutoencoderTiny.from_pretrained(checkpoint.root / "vae_tiny", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_every_part_is_there_with_the_shapes_it_is_exported_for(case):
    checkpoint, parts, recording = case
    assert tuple(recording.kinds.items()) == tuple((part.name, part.kind) for part in parts)
    for part in parts:
        assert len(recording.calls[part.name]) == (2 if part.component == "transformer" else 1)
        specs = part_inputs(part.kind, checkpoint.configs, recording.shapes)
        for step in range(len(recording.calls[part.name])):
            inputs = recording.inputs(part.name, step)
            found = [(name, array.shape, array.dtype.name) for name, array in inputs.items()]
            assert found == [(spec.name, spec.shape, spec.dtype) for spec in specs], part.name
            outputs = recording.outputs(part.name, step)
            assert tuple(outputs) == part.traits.outputs
            assert all(array.dtype == np.float32 and np.isfinite(array).all() for array in outputs.values())


def test_outputs_are_the_inputs_of_the_next_part(case):
    checkpoint, parts, recording = case
    singles = [part.name for part in parts if part.kind == "single"]
    for step in range(recording.steps):
        head, first = recording.outputs("head", step), recording.inputs("double.00", step)
        for name in ("hidden_states", "encoder_hidden_states"):
            np.testing.assert_array_equal(head[f"{name}_out"], first[name])
        np.testing.assert_array_equal(head["temb"], first["temb"])
        last = recording.outputs("double.01", step)
        joint = np.concatenate([last["encoder_hidden_states_out"], last["hidden_states_out"]], axis=1)
        for name in singles:
            np.testing.assert_array_equal(joint, recording.inputs(name, step)["hidden_states"])
            joint = recording.outputs(name, step)["hidden_states_out"]
        image = joint[:, recording.shapes.tokens :]
        np.testing.assert_array_equal(image, recording.inputs("tail", step)["hidden_states"])
    embeds = recording.outputs("t5_final")["last_hidden_state"]
    np.testing.assert_array_equal(embeds, recording.inputs("head", 1)["encoder_hidden_states"])
    np.testing.assert_array_equal(embeds, recording.rendering("prompt_embeds"))
    row = pooled_row(recording.inputs("clip")["input_ids"], checkpoint.configs["text_encoder"])
    pooled = recording.outputs("clip")["last_hidden_state"][:, row]
    np.testing.assert_array_equal(pooled, recording.inputs("head")["pooled_projections"])
    np.testing.assert_array_equal(pooled, recording.rendering("pooled_prompt_embeds"))


def test_every_part_changes_what_it_is_given(case):
    """Otherwise a part that does nothing would pass every comparison."""
    _, parts, recording = case
    for part in parts:
        for output, base in part.traits.residual:
            before, after = recording.inputs(part.name)[base], recording.outputs(part.name)[output]
            assert np.linalg.norm(after - before) > 0.1 * np.linalg.norm(before), part.name


def test_host_constants_are_what_the_reference_computes(case):
    checkpoint, _, recording = case
    constants = make_constants(checkpoint.configs, recording.shapes, TensorReader(checkpoint), split=False)
    for name in ("rotary_cos", "rotary_sin"):
        np.testing.assert_array_equal(recording.inputs("double.01", 1)[name], constants[name])
        np.testing.assert_array_equal(recording.inputs("single.02", 0)[name], constants[name])
    for name in ("t5_block.00", "t5_block.01"):
        np.testing.assert_array_equal(recording.inputs(name)["position_bias"], constants["position_bias"])


def test_head_inputs_are_as_the_pipeline_gives_them(case):
    checkpoint, _, recording = case
    times = [float(recording.inputs("head", step)["timestep"][0]) for step in range(2)]
    assert times[0] == 1.0
    assert 0.3 < times[1] < 1.0
    assert ("guidance" in recording.inputs("head")) == (checkpoint.variant == "dev")
    if checkpoint.variant == "dev":
        assert recording.inputs("head")["guidance"].tolist() == [3.5]


def test_recording_does_not_disturb_the_pipeline(case):
    """The same numbers as diffusers called the plain way, without hooks."""
    checkpoint, parts, recording = case
    pipe = load_pipeline(checkpoint, "tiny" if parts[-1].kind == "tiny_vae_decoder" else "kl")
    shapes = recording.shapes
    call = {
        "prompt": PROMPT,
        "height": shapes.height,
        "width": shapes.width,
        "max_sequence_length": shapes.tokens,
        "num_inference_steps": 2,
    }
    image = pipe(**call, generator=torch.Generator().manual_seed(0), output_type="np").images[0]
    latents = pipe(**call, generator=torch.Generator().manual_seed(0), output_type="latent").images
    np.testing.assert_array_equal(recording.image, image)
    np.testing.assert_array_equal(recording.latents, latents.numpy())
    assert recording.image.std() > 0.05, "a flat image compares equal to anything flat"


def test_decoder_gets_latents_scaled_back(case):
    from diffusers import FluxPipeline

    checkpoint, parts, recording = case
    config = checkpoint.configs["vae_tiny" if parts[-1].kind == "tiny_vae_decoder" else "vae"]
    shapes = recording.shapes
    unpacked = FluxPipeline._unpack_latents(torch.from_numpy(recording.latents), shapes.height, shapes.width, 8)
    expected = unpacked / config["scaling_factor"] + config["shift_factor"]
    np.testing.assert_array_equal(recording.inputs(parts[-1].name)["latents"], expected.numpy())
    decoded = recording.outputs(parts[-1].name)["image"][0].transpose(1, 2, 0)
    np.testing.assert_allclose(np.clip(decoded / 2 + 0.5, 0, 1), recording.image, atol=1e-7)


def test_an_array_is_stored_once(tiny_recording):
    recording = tiny_recording()
    mentioned = [
        file
        for calls in recording.calls.values()
        for call in calls
        for files in call.values()
        for file in files.values()
    ]
    stored = {f"tensors/{path.name}" for path in (recording.root / "tensors").iterdir()}
    assert set(mentioned) | set(recording.rendered.values()) == stored
    assert len(mentioned) > 1.4 * len(stored)


def test_same_seed_same_recording_and_another_differs(tiny_checkpoint, tiny_recording, tmp_path):
    checkpoint, first = tiny_checkpoint(), tiny_recording()
    parts = list_parts(checkpoint.configs)
    again = record_reference(checkpoint, parts, SHAPES, tmp_path / "again")
    assert (again.calls, again.rendered) == (first.calls, first.rendered)
    other = record_reference(checkpoint, parts, SHAPES, tmp_path / "again", Sampling(seed=1))
    assert other.rendered["latents"] != first.rendered["latents"]
    assert other.rendered["prompt_embeds"] == first.rendered["prompt_embeds"]
    left = {path.name for path in (tmp_path / "again" / "tensors").iterdir()}
    assert first.rendered["latents"].removeprefix("tensors/") not in left, "the older recording is replaced"


def test_as_many_steps_as_are_asked_for(tiny_checkpoint, tmp_path):
    checkpoint = tiny_checkpoint()
    recording = record_reference(checkpoint, list_parts(checkpoint.configs), SHAPES, tmp_path, Sampling(steps=3))
    assert recording.steps == len(recording.calls["single.00"]) == 3
    assert len(recording.calls["clip"]) == 1


def test_unknown_part_or_step_is_named(tiny_recording):
    recording = tiny_recording()
    with pytest.raises(UsageError, match=r"'double.07' was recorded; there are clip, .*double.01"):
        recording.inputs("double.07")
    with pytest.raises(UsageError, match=r"step 2 of tail was not recorded; it ran 2 times"):
        recording.outputs("tail", 2)
    with pytest.raises(UsageError, match="step 1 of clip"):
        recording.outputs("clip", 1)


def test_round_trip(tiny_recording):
    recording = tiny_recording()
    assert read_recording(recording.root) == recording


def test_unfinished_recording_is_refused(spoilt, tmp_path):
    with pytest.raises(IntegrityError, match="holds no finished recording"):
        read_recording(tmp_path / "nowhere")
    (spoilt / module.INDEX).unlink()
    with pytest.raises(IntegrityError, match="record the reference again"):
        read_recording(spoilt)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', '{"format": 99}'])
def test_damaged_index_is_refused(spoilt, text):
    (spoilt / module.INDEX).write_text(text, encoding="utf-8")
    with pytest.raises(IntegrityError):
        read_recording(spoilt)


def test_damaged_array_is_named(spoilt):
    recording = read_recording(spoilt)
    path = spoilt / recording.rendered["image"]
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(IntegrityError, match=path.name):
        _ = recording.image
    path.unlink()
    with pytest.raises(IntegrityError, match=path.name):
        _ = recording.image


def test_failed_run_leaves_no_recording(tiny_checkpoint, tiny_recording, tmp_path, monkeypatch):
    """A recording that is there is not taken for the result of a run that failed."""
    checkpoint = tiny_checkpoint()
    destination = shutil.copytree(tiny_recording().root, tmp_path / "recording")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(ResourceError, match="No space left on device; a recording holds"):
        record_reference(checkpoint, list_parts(checkpoint.configs), SHAPES, destination)
    assert not (destination / module.INDEX).exists()
    assert list((destination / "tensors").iterdir()) == []


def test_part_that_upstream_does_not_call_is_named(tiny_checkpoint, tmp_path, monkeypatch):
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL, DecoderOutput

    black = torch.zeros(1, 3, SHAPES.height, SHAPES.width)
    monkeypatch.setattr(AutoencoderKL, "_decode", lambda self, z, **_: DecoderOutput(black))
    checkpoint = tiny_checkpoint()
    with pytest.raises(PatchError, match="part vae_decoder ran 0 times in the reference, 1 were expected"):
        record_reference(checkpoint, list_parts(checkpoint.configs), SHAPES, tmp_path)
    assert not (tmp_path / module.INDEX).exists()


def test_module_that_upstream_calls_in_another_way_is_told(tiny_checkpoint, tmp_path, monkeypatch):
    """Hooks do not run then, so neither weights nor arrays come and go."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL, DecoderOutput

    monkeypatch.setattr(AutoencoderKL, "_decode", lambda self, z, **_: DecoderOutput(self.decoder.forward(z)))
    checkpoint = tiny_checkpoint()
    with pytest.raises(PatchError, match="a module ran without its weights"):
        record_reference(checkpoint, list_parts(checkpoint.configs), SHAPES, tmp_path)
    assert not (tmp_path / module.INDEX).exists()


def test_renamed_upstream_argument_is_named(tiny_checkpoint, tmp_path, monkeypatch):
    from torch.nn import Embedding, functional

    def forward(self, ids):
        return functional.embedding(ids, self.weight)

    monkeypatch.setattr(Embedding, "forward", forward)
    checkpoint = tiny_checkpoint()
    with pytest.raises(PatchError, match=r"Embedding.forward was called without 'input'"):
        record_reference(checkpoint, list_parts(checkpoint.configs), SHAPES, tmp_path)


def test_missing_tiny_vae_is_named(tiny_checkpoint, tmp_path):
    checkpoint = tiny_checkpoint()
    root = tmp_path / "model"
    shutil.copytree(checkpoint.root, root, ignore=shutil.ignore_patterns("vae_tiny"))
    with pytest.raises(CheckpointError, match="has no folder vae_tiny"):
        record_reference(open_checkpoint(root), list_parts(checkpoint.configs, "tiny"), SHAPES, tmp_path / "out")


def test_index_is_plain_json_with_relative_paths(tiny_recording):
    recording = tiny_recording()
    text = (recording.root / module.INDEX).read_text(encoding="utf-8")
    assert json.loads(text)["shapes"] == {"height": 64, "width": 64, "tokens": 32}
    assert str(recording.root) not in text
