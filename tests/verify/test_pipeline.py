"""The streamed pipeline equals the loaded one to the bit, with one unit's weights in memory at a time."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from fluxkiln.errors import CheckpointError
from fluxkiln.export.checkpoint import TensorReader
from fluxkiln.export.eager import PatchedRunner
from fluxkiln.patches.flux1.kinds import list_parts
from fluxkiln.patches.flux1.published import render
from fluxkiln.patches.pipeline import Sampling
from fluxkiln.types import Shapes
from fluxkiln.verify import pipeline as streamed_pipeline
from fluxkiln.verify.pipeline import open_pipeline
from fluxkiln.verify.reference import record_reference

SHAPES = Shapes(height=64, width=64, tokens=32)
CASES = [("tiny-dev", "kl"), ("tiny-dev", "tiny"), ("tiny-schnell", "kl")]
MODELS = ("text_encoder", "text_encoder_2", "transformer", "vae")
WHOLE = {name: name for name in MODELS}


def load_pipeline(checkpoint, folders=WHOLE):
    """The same pipeline with all of its weights in memory."""
    from diffusers import AutoencoderTiny, FluxPipeline

    root, tiny = checkpoint.root, folders["vae"] == "vae_tiny"
    given = {"vae": AutoencoderTiny.from_pretrained(root / "vae_tiny", dtype=torch.float32)} if tiny else {}
    return FluxPipeline.from_pretrained(root, dtype=torch.float32, **given)


def parameters(pipe):
    """(component, name) -> parameter; a tied one under each of its names."""
    models = {name: getattr(pipe, name) for name in MODELS}
    return {
        (component, name): parameter
        for component, model in models.items()
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def in_memory(pipe):
    return {place for place, parameter in parameters(pipe).items() if parameter.device.type != "meta"}


class Watching(TensorReader):
    """A reader that notes, whenever a unit has all its weights, which parameters are in memory."""

    def __init__(self, checkpoint):
        super().__init__(checkpoint)
        self.pipe, self.seen, self.reads, self.expected = None, [], Counter(), []

    def __call__(self, component, name):
        self.reads[component, name] += 1
        return super().__call__(component, name)

    def expect(self, component, names):
        self.seen.append(in_memory(self.pipe))
        self.expected.append((component, tuple(names)))
        super().expect(component, names)


@pytest.fixture
def watch(monkeypatch):
    """checkpoint -> what reads its weights from now on."""

    def make(checkpoint):
        reader = Watching(checkpoint)
        monkeypatch.setattr(streamed_pipeline, "TensorReader", lambda _: reader)
        return reader

    return make


def run(checkpoint, reader, steps=2):
    pipe = open_pipeline(checkpoint, WHOLE)
    reader.pipe = pipe
    return pipe, render(pipe, SHAPES, Sampling(steps=steps))


@pytest.mark.parametrize(("preset", "vae"), CASES)
def test_recording_equals_that_of_the_loaded_pipeline(tiny_checkpoint, tmp_path, monkeypatch, watch, preset, vae):
    """Files are called by their contents: equal names are equal bits, of every input and output of every part."""
    checkpoint = tiny_checkpoint(preset)
    parts = list_parts(checkpoint.configs, vae)
    reader = watch(checkpoint)
    reader.expect = lambda *_: None
    streamed = record_reference(checkpoint, parts, SHAPES, tmp_path / "streamed")
    assert reader.reads
    monkeypatch.setattr(streamed_pipeline, "open_pipeline", load_pipeline)
    loaded = record_reference(checkpoint, parts, SHAPES, tmp_path / "loaded")
    assert (streamed.calls, streamed.rendered) == (loaded.calls, loaded.rendered)


def test_buffers_have_the_loaded_models_values(tiny_checkpoint):
    checkpoint = tiny_checkpoint()
    streamed = open_pipeline(checkpoint, WHOLE)
    loaded = load_pipeline(checkpoint)
    found = 0
    for name in MODELS:
        mine, published = (dict(getattr(pipe, name).named_buffers()) for pipe in (streamed, loaded))
        assert mine.keys() == published.keys()
        for key, buffer in mine.items():
            assert torch.equal(buffer, published[key])
            found += 1
    assert found, "CLIP's position ids at least"


def unit_of(component, name):
    """The unit a parameter belongs to."""
    if component in ("text_encoder", "vae"):
        return component
    block = re.match(r"(transformer_blocks|single_transformer_blocks|encoder\.block)\.\d+", name)
    if block:
        return block[0]
    # the token embedding has two names
    return {"shared.weight": "encoder.embed_tokens"}.get(name, name.removeprefix("encoder.").split(".")[0])


def test_one_unit_at_a_time_is_in_memory(tiny_checkpoint, watch):
    checkpoint = tiny_checkpoint()
    reader = watch(checkpoint)
    pipe, _ = run(checkpoint, reader)
    assert in_memory(pipe) == set()
    units = [{unit_of(*place) for place in seen} for seen in reader.seen]
    assert {len(unit) for unit in units} == {1}
    expected = ["time_text_embed", "context_embedder", "x_embedder", "transformer_blocks", "single_transformer_blocks"]
    assert {unit.pop().split(".")[0] for unit in units} >= {*expected, "norm_out", "encoder"}
    whole = {place for place in parameters(pipe) if unit_of(*place) == "transformer_blocks.1"}
    assert whole in reader.seen, "a unit has all its weights when it runs"


def test_what_is_read_next_is_told(tiny_checkpoint, watch):
    reader = watch(tiny_checkpoint())
    run(tiny_checkpoint(), reader, steps=1)
    told = [{unit_of(component, name) for name in names} for component, names in reader.expected]
    assert {len(units) for units in told} == {1}
    blocks = [unit for units in told for unit in units if "_blocks." in unit]
    assert blocks == [
        *(f"transformer_blocks.{i}" for i in range(2)),
        *(f"single_transformer_blocks.{i}" for i in range(3)),
    ]


def test_each_weight_is_read_once_a_step_and_no_other(tiny_checkpoint, watch):
    checkpoint = tiny_checkpoint()
    reader = watch(checkpoint)
    run(checkpoint, reader)
    assert {name for component, name in reader.reads if component == "transformer"} == set(
        checkpoint.tensors["transformer"]
    )
    for (component, name), count in reader.reads.items():
        assert count == (2 if component == "transformer" else 1), name
    assert not [name for component, name in reader.reads if component == "vae" and not name.startswith("decoder.")]


def test_a_failure_leaves_no_weights_behind(tiny_checkpoint, watch):
    checkpoint = tiny_checkpoint()
    tensors = {component: dict(refs) for component, refs in checkpoint.tensors.items()}
    del tensors["transformer"]["transformer_blocks.1.attn.to_k.bias"]
    checkpoint = replace(checkpoint, tensors=tensors)
    reader = watch(checkpoint)
    with pytest.raises(CheckpointError, match=r"has no tensor transformer_blocks\.1\.attn\.to_k\.bias"):
        run(checkpoint, reader)
    assert in_memory(reader.pipe) == set()


def test_a_tensor_of_another_shape_is_refused(tiny_checkpoint, watch):
    checkpoint = tiny_checkpoint()
    tensors = {component: dict(refs) for component, refs in checkpoint.tensors.items()}
    tensors["transformer"]["proj_out.bias"] = tensors["transformer"]["x_embedder.bias"]
    checkpoint = replace(checkpoint, tensors=tensors)
    reader = watch(checkpoint)
    with pytest.raises(CheckpointError, match=r"proj_out\.bias of transformer has shape \[256\]"):
        run(checkpoint, reader)


def test_a_buffer_without_values_is_refused(tiny_checkpoint, monkeypatch):
    """Something upstream may come to make a buffer the way parameters are made."""
    from diffusers import FluxTransformer2DModel

    from fluxkiln.errors import PatchError

    original = FluxTransformer2DModel.__init__

    def with_buffer(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.register_buffer("table", torch.empty(3), persistent=False)

    monkeypatch.setattr(FluxTransformer2DModel, "__init__", with_buffer)
    with pytest.raises(PatchError, match="FluxTransformer2DModel has a buffer table without values"):
        open_pipeline(tiny_checkpoint(), WHOLE)


@pytest.mark.parametrize("names", [("double.01", "single.02", "t5_block.01"), ("single.00",)])
def test_a_shortened_pipeline_chains_the_chosen_blocks(tiny_checkpoint, watch, tmp_path, names):
    checkpoint = tiny_checkpoint()
    once = ("clip", "t5_embed", "t5_final", "head", "tail")
    parts = tuple(part for part in list_parts(checkpoint.configs) if part.name in (*once, *names))
    reader = watch(checkpoint)
    reader.expect = lambda *_: None
    recording = record_reference(checkpoint, parts, SHAPES, tmp_path, Sampling(steps=1), only=True)
    assert tuple(recording.calls) == tuple(part.name for part in parts)
    run_part = PatchedRunner(checkpoint, parts)
    for part in parts:
        made = run_part(part.name, recording.inputs(part.name))
        for output, expected in recording.outputs(part.name).items():
            np.testing.assert_allclose(made[output], expected, rtol=1e-4, atol=1e-4)
    read = {unit_of(*place) + "." for place in reader.reads if "block" in place[1]}
    assert read == {part.prefix for part in parts if "block" in part.prefix} | {"encoder.block.0."}
    assert not [name for component, name in reader.reads if component == "vae"]
    assert recording.image.size == 0, "there is no VAE among the parts"
    if "double.01" in names:
        joint = np.concatenate(
            [recording.outputs("double.01")[f"{name}_out"] for name in ("encoder_hidden_states", "hidden_states")], 1
        )
        np.testing.assert_array_equal(recording.inputs("single.02")["hidden_states"], joint)


def test_a_shortened_pipeline_may_keep_its_decoder(tiny_checkpoint, tmp_path):
    checkpoint = tiny_checkpoint()
    parts = tuple(part for part in list_parts(checkpoint.configs) if part.kind in ("tail", "vae_decoder"))
    recording = record_reference(checkpoint, parts, SHAPES, tmp_path, Sampling(steps=1), only=True)
    assert recording.image.std() > 0.05
    assert tuple(recording.calls) == ("tail", "vae_decoder")
