"""Recordings of some components: what they compute is diffusers' own, what is missing is random and never read."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest

from fluxkiln.export.checkpoint import open_checkpoint
from fluxkiln.export.eager import PatchedRunner
from fluxkiln.patches.flux1.kinds import list_parts
from fluxkiln.patches.flux1.model import MODEL
from fluxkiln.patches.pipeline import Sampling
from fluxkiln.types import Shapes
from fluxkiln.verify.reference import record_reference

SHAPES = Shapes(height=64, width=96, tokens=24)


@pytest.fixture
def record(tiny_checkpoint, tmp_path):
    """(components, vae, seed) -> parts and recording of a checkpoint that has nothing else."""

    def make(components, vae="kl", seed=0, preset="tiny-dev"):
        whole = tiny_checkpoint(preset)
        root = tmp_path / "-".join((*components, vae, str(seed)))
        gone = {name for name in (*MODEL.components, "vae_tiny") if name not in components}
        if "vae" in components:
            gone.discard("vae_tiny")
        gone |= {t for m, t in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")) if m in gone}
        shutil.copytree(
            whole.root, root, ignore=lambda folder, names: gone & set(names) if folder == str(whole.root) else ()
        )
        checkpoint = open_checkpoint(root, components)
        parts = tuple(part for part in list_parts(whole.configs, vae) if part.component in components)
        recording = record_reference(checkpoint, parts, SHAPES, root / "recording", Sampling(seed=seed))
        return replace(checkpoint, configs=whole.configs), parts, recording

    return make


@pytest.mark.parametrize(
    "components",
    [("transformer",), ("text_encoder",), ("text_encoder_2",), ("vae",), ("text_encoder_2", "transformer"),
     ("transformer", "vae")],
    ids="-".join,
)  # fmt: skip
def test_each_part_equals_the_patched_one(record, components):
    checkpoint, parts, recording = record(components)
    run_part = PatchedRunner(checkpoint, parts)
    assert set(recording.calls) == {part.name for part in parts}
    for part in parts:
        for step in range(len(recording.calls[part.name])):
            made = run_part(part.name, recording.inputs(part.name, step))
            for output, expected in recording.outputs(part.name, step).items():
                error = np.linalg.norm(made[output] - expected) / np.linalg.norm(expected)
                assert error <= 1e-6, (part.name, output)
    assert len(recording.calls[parts[-1].name]) == (1 if parts[-1].component != "transformer" else 2)


def test_a_transformer_alone_gets_embeddings_in_which_no_two_tokens_are_equal(record):
    _, _, recording = record(("transformer",))
    assert recording.rendering("prompt_embeds").shape == (1, 24, 128)
    assert recording.rendering("pooled_prompt_embeds").shape == (1, 64)
    assert len(np.unique(recording.rendering("prompt_embeds")[0], axis=0)) == 24
    np.testing.assert_array_equal(
        recording.inputs("head")["encoder_hidden_states"], recording.rendering("prompt_embeds")
    )
    assert recording.latents.shape == (1, 24, 64)
    assert recording.image.size == 0
    _, _, other = record(("transformer",), seed=1)
    assert not np.array_equal(other.rendering("prompt_embeds"), recording.rendering("prompt_embeds"))


def test_schnell_and_the_tiny_vae(record):
    _, _, recording = record(("transformer", "vae"), vae="tiny", preset="tiny-schnell")
    assert "guidance" not in recording.inputs("head")
    assert recording.image.shape == (64, 96, 3)
    assert recording.image.std() > 0.05


def test_a_decoder_alone_gets_latents_as_the_pipeline_scales_them(record):
    checkpoint, _, recording = record(("vae",))
    config = checkpoint.configs["vae"]
    expected = recording.latents / np.float32(config["scaling_factor"]) + np.float32(config["shift_factor"])
    np.testing.assert_allclose(recording.inputs("vae_decoder")["latents"], expected, rtol=1e-6)
    assert recording.image.shape == (64, 96, 3)
    assert recording.rendering("prompt_embeds").size == recording.rendering("pooled_prompt_embeds").size == 0


def test_encoders_alone_encode_the_prompt_as_the_pipeline_does(record, tiny_checkpoint, tmp_path):
    whole = tiny_checkpoint()
    everything = record_reference(whole, list_parts(whole.configs), SHAPES, tmp_path / "all")
    for component, name in (("text_encoder", "pooled_prompt_embeds"), ("text_encoder_2", "prompt_embeds")):
        _, _, alone = record((component,))
        np.testing.assert_array_equal(alone.rendering(name), everything.rendering(name))
        assert alone.latents.size == 0
