from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from fluxkiln.errors import CheckpointError
from fluxkiln.export.bindings import (
    apply_transforms,
    bind_part,
    binding_refs,
    transformed_shape,
    weight_reader,
)
from fluxkiln.export.checkpoint import read_tensor
from fluxkiln.export.graph import slot_transforms
from fluxkiln.export.safetensors_header import read_into
from fluxkiln.patches.flux1.kinds import KINDS, list_parts
from fluxkiln.types import SlotBinding, TensorSpec, Transform, find_part

PROJ = "single_transformer_blocks.1.proj_out.weight"
SLOTS = (TensorSpec("proj_out.weight__s1.0.256__t", (256, 256)), TensorSpec("proj_out.bias", (256,)))


@pytest.fixture
def part(tiny_checkpoint):
    return find_part(list_parts(tiny_checkpoint().configs), "single.01")


def test_slots_are_bound_below_the_parts_prefix(tiny_checkpoint, part):
    checkpoint = tiny_checkpoint()
    binding = bind_part(part, SLOTS, checkpoint)
    assert (binding.part, binding.component) == ("single.01", "transformer")
    cut = Transform("slice", dim=1, start=0, stop=256)
    assert binding.slots[0] == SlotBinding(SLOTS[0].name, (PROJ,), (cut, Transform("transpose")))
    assert [ref.name for ref in binding_refs(binding, checkpoint)] == [PROJ, PROJ.replace("weight", "bias")]


def test_weights_come_in_torchs_layout_and_dtype(tiny_checkpoint, part):
    """The last transpose is the graph's own layout, so the reader leaves it out."""
    checkpoint = tiny_checkpoint()
    read = weight_reader(bind_part(part, SLOTS, checkpoint), checkpoint)
    whole = read_tensor(checkpoint.tensors["transformer"][PROJ])
    made = read(SLOTS[0].name)
    assert made.dtype == ml_dtypes.bfloat16
    assert made.flags.c_contiguous
    assert made.tobytes() == np.ascontiguousarray(whole[:, :256]).tobytes()
    other = find_part(list_parts(checkpoint.configs), "single.02")
    assert weight_reader(bind_part(other, SLOTS, checkpoint), checkpoint)(SLOTS[0].name).tobytes() != made.tobytes()


@pytest.mark.parametrize("slot", [
    "proj_out.weight", "proj_out.weight__s1.0.256__t", "proj_out.weight__s0.64.192__s1.256.512__t",
    "proj_out.weight__t__s0.256.512", "proj_out.weight__s0.64.192__f0x1_8p+0", "proj_out.bias__s0.8.200",
])  # fmt: skip
def test_rows_are_those_of_the_whole_weight(tiny_checkpoint, part, slot):
    checkpoint = tiny_checkpoint()
    base, transforms = slot_transforms(slot)
    ref = checkpoint.tensors["transformer"][part.prefix + base]
    spec = TensorSpec(slot, transformed_shape(ref.shape, transforms))
    read = weight_reader(bind_part(part, (spec,), checkpoint), checkpoint)
    whole = read(slot)
    for start, stop in ((0, len(whole)), (3, 70), (len(whole) - 1, len(whole)), (5, 5)):
        rows = read.read_rows(slot, start, stop)
        assert rows.dtype == whole.dtype
        assert rows.shape == whole[start:stop].shape
        assert rows.tobytes() == whole[start:stop].tobytes()


def test_only_the_rows_are_read(tiny_checkpoint, part, monkeypatch):
    checkpoint, asked = tiny_checkpoint(), []

    def note(stream, target, ref):
        asked.append(ref)
        return read_into(stream, target, ref)

    monkeypatch.setattr("fluxkiln.export.checkpoint.read_into", note)
    read = weight_reader(bind_part(part, SLOTS, checkpoint), checkpoint)
    read.read_rows(SLOTS[0].name, 16, 48)
    whole = checkpoint.tensors["transformer"][PROJ]
    (ref,) = asked
    assert ref.shape == (32, whole.shape[1])
    assert (ref.offset, ref.nbytes) == (whole.offset + 16 * whole.shape[1] * 2, 32 * whole.shape[1] * 2)


def test_transforms_in_order():
    weight = np.arange(12, dtype=np.float32).reshape(3, 4)
    steps = (Transform("slice", dim=1, start=1, stop=3), Transform("scale", factor=2.0), Transform("transpose"))
    made = apply_transforms(weight, steps)
    assert made.tolist() == [[2, 10, 18], [4, 12, 20]]
    assert made.shape == transformed_shape(weight.shape, steps)
    assert apply_transforms(weight.astype(ml_dtypes.bfloat16), steps[:1]).dtype == ml_dtypes.bfloat16
    assert apply_transforms(weight.astype(ml_dtypes.bfloat16), steps).dtype == np.float32


def test_missing_tensor_and_wrong_shape_are_named(tiny_checkpoint, part):
    checkpoint = tiny_checkpoint()
    with pytest.raises(CheckpointError, match=r"has no tensor single_transformer_blocks\.1\.stray, which part single"):
        bind_part(part, (TensorSpec("stray", (1,)),), checkpoint)
    with pytest.raises(CheckpointError, match=r"which gives \[256\] where part single\.01 needs \[255\]"):
        bind_part(part, (TensorSpec("proj_out.bias", (255,)),), checkpoint)


def test_the_tiny_decoder_has_tensors_of_its_own(tiny_checkpoint):
    (tiny,) = (part for part in list_parts(tiny_checkpoint().configs, "tiny") if part.component == "vae")
    assert tiny.folder == "vae_tiny"
    assert replace(tiny, traits=KINDS["vae_decoder"]).folder == "vae"
