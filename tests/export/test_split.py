"""Bindings of each rank: they cover the checkpoint, agree with diffusers' own plan, and refuse what does not fit."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from fluxkiln.errors import CheckpointError, PatchError, UsageError
from fluxkiln.export.bindings import (
    BoundWeights,
    apply_transforms,
    bind_shard,
    split_slots,
    transformed_shape,
    window_of,
)
from fluxkiln.export.checkpoint import read_tensor
from fluxkiln.patches.flux1.kinds import CUTS, list_split_parts
from fluxkiln.patches.flux1.model import MODEL
from fluxkiln.patches.flux1.presets import PRESETS
from fluxkiln.types import Binding, SlotBinding, TensorSpec, Transform
from tests.export.diffusers_plan import check_against_diffusers

# what is cut here and whole in diffusers: the AdaLN linears, so that no rank holds all of them
MODULATION = re.compile(
    r"(transformer_blocks\.\d+\.norm1(_context)?|single_transformer_blocks\.\d+\.norm|norm_out)\.linear\.(weight|bias)"
)


@pytest.mark.parametrize(("preset", "ranks"), [("tiny-dev", 2), ("wide-dev", 2), ("wide-dev", 8), ("wide-dev", 24)])
def test_every_linear_that_diffusers_cuts_is_cut_the_same_way(preset, ranks):
    configs = PRESETS[preset].configs
    beyond = check_against_diffusers(configs, ranks)
    assert all(MODULATION.fullmatch(name) for name in beyond)
    flux = configs["transformer"]
    assert len(beyond) == 2 * (2 * flux["num_layers"] + flux["num_single_layers"] + 1)


def test_another_cut_than_diffusers_is_seen(monkeypatch):
    configs = PRESETS["tiny-dev"].configs
    other = tuple(replace(cut, way="column") if "net\\.2\\.weight" in cut.slots else cut for cut in CUTS["double"])
    monkeypatch.setitem(CUTS, "double", other)
    with pytest.raises(PatchError, match=r"transformer_blocks.0.ff.net.2.weight is cut as .*diffusers cuts it as"):
        check_against_diffusers(configs, 2)


def test_halves_of_the_single_blocks_projection_must_not_be_mixed(monkeypatch):
    """Contiguous columns of the whole tensor would give one rank the attention's and another the MLP's."""
    mixed = [cut for cut in CUTS["single"] if cut.half != "mlp"]
    mixed.append(replace(next(cut for cut in CUTS["single"] if cut.half == "mlp"), half="attention"))
    monkeypatch.setitem(CUTS, "single", tuple(mixed))
    with pytest.raises(PatchError, match=r"single_transformer_blocks.0.proj_out.weight is cut as"):
        check_against_diffusers(PRESETS["tiny-dev"].configs, 2)


@pytest.mark.parametrize("granularity", ["block", "group:2", "whole"])
def test_parts_hold_every_tensor_of_the_checkpoint(tiny_checkpoint, granularity):
    checkpoint = tiny_checkpoint()
    held = []
    for part in list_split_parts(checkpoint.configs, granularity):
        ranks = part.ranks(2)
        slots = split_slots(MODEL, part, checkpoint.configs, ranks)
        binding = bind_shard(part, slots, checkpoint, ranks, ranks - 1)
        assert [slot.slot for slot in binding.slots] == [spec.name for spec in slots]
        held += [(part.component, slot.sources[0]) for slot in binding.slots]
    twice = {name for name in held if held.count(name) > 1}
    assert twice == {("transformer", f"single_transformer_blocks.{i}.proj_out.weight") for i in range(3)}
    all_names = {(component, name) for component in checkpoint.tensors for name in checkpoint.tensors[component]}
    left = {(component, name) for component, name in all_names - set(held) if not name.startswith("encoder.")}
    assert {component for component, _ in left} <= {"vae_tiny"}


def test_names_of_parts_and_of_their_slots():
    configs = PRESETS["tiny-dev"].configs
    assert [part.name for part in list_split_parts(configs, "group:2", "tiny")] == [
        *("clip", "t5", "head", "double.00-01", "single.00-01", "single.02", "tail", "tiny_vae_decoder"),
    ]
    names = {
        part.name: [spec.name for spec in split_slots(MODEL, part, configs, 2)] for part in list_split_parts(configs)
    }
    assert "attn.to_q.weight" in names["double.01"]
    assert names["double.00"] == names["double.01"]
    group = next(part for part in list_split_parts(configs, "group:2") if part.name == "single.00-01")
    assert [spec.name for spec in split_slots(MODEL, group, configs, 2)] == [
        f"{i}.{name}" for i in range(2) for name in names["single.00"]
    ]
    (whole,) = (part for part in list_split_parts(configs, "whole") if part.kind == "transformer")
    assert split_slots(MODEL, whole, configs, 2)[-1].name == "6.proj_out.bias"
    for granularity in ("group:0", "group:", "blocks", ""):
        with pytest.raises(UsageError, match=re.escape(f"granularity {granularity!r}: block, group:N")):
            list_split_parts(configs, granularity)


def test_ranks_of_what_runs_on_one_core():
    parts = {part.name: part for part in list_split_parts(PRESETS["tiny-dev"].configs)}
    assert {name for name, part in parts.items() if part.ranks(8) == 1} == {"clip", "vae_decoder"}
    assert parts["t5"].ranks(8) == 8


def test_what_does_not_fit_is_refused(tiny_checkpoint):
    checkpoint = tiny_checkpoint()
    part = next(part for part in list_split_parts(checkpoint.configs) if part.name == "double.01")
    slots = split_slots(MODEL, part, checkpoint.configs, 2)
    with pytest.raises(UsageError, match="rank 2 of 2"):
        bind_shard(part, slots, checkpoint, 2, 2)
    with pytest.raises(CheckpointError, match=r"gives \[128, 256\] on one of 2 ranks where part double.01 needs"):
        bind_shard(part, split_slots(MODEL, part, checkpoint.configs, 1), checkpoint, 2, 0)
    tensors = {**checkpoint.tensors["transformer"]}
    del tensors["transformer_blocks.1.ff.net.2.bias"]
    without = replace(checkpoint, tensors={**checkpoint.tensors, "transformer": tensors})
    with pytest.raises(
        CheckpointError, match=r"has no tensor transformer_blocks.1.ff.net.2.bias, which part double.01"
    ):
        bind_shard(part, slots, without, 2, 0)


def test_padding_is_a_transform(tiny_checkpoint):
    """Rows 3 and 4 of five, behind them zeros."""
    steps = (Transform("slice", dim=0, start=3, stop=5), Transform("pad", dim=0, stop=4))
    assert transformed_shape((5, 2), steps) == (4, 2)
    made = apply_transforms(np.arange(10, dtype=np.float32).reshape(5, 2), steps)
    assert made.tolist() == [[6, 7], [8, 9], [0, 0], [0, 0]]
    columns = (Transform("slice", dim=1, start=2, stop=2), Transform("pad", dim=1, stop=1))
    assert apply_transforms(np.ones((5, 2), np.float32), columns).tolist() == [[0]] * 5
    ref = tiny_checkpoint().tensors["transformer"]["x_embedder.weight"]
    padded = (Transform("pad", dim=0, stop=ref.shape[0] + 2),)
    weights = BoundWeights({ref.name: ref}, {"x": SlotBinding("x", (ref.name,), padded)})
    whole = np.concatenate([read_tensor(ref), np.zeros((2, ref.shape[1]), read_tensor(ref).dtype)])
    assert np.array_equal(weights.read_rows("x", ref.shape[0] - 1, ref.shape[0] + 2), whole[-3:])


def test_window_is_what_the_transforms_take():
    steps = (
        Transform("slice", dim=1, start=10, stop=50),
        Transform("slice", dim=1, start=30, stop=40),
        Transform("pad", dim=1, stop=16),
    )
    window = window_of((3, 50), steps)
    assert (window.rows, window.columns, window.shape) == ((0, 3), (40, 50), (3, 16))
    assert window_of((7,), ()).shape == (7,)
    assert window_of((7,), ()).columns == (0, 1)
    with pytest.raises(UsageError, match="transform transpose"):
        window_of((3, 50), (Transform("transpose"),))


def test_binding_type_is_shared_with_the_other_stages(tiny_checkpoint):
    checkpoint = tiny_checkpoint()
    part = next(part for part in list_split_parts(checkpoint.configs) if part.name == "tail")
    slots = split_slots(MODEL, part, checkpoint.configs, 2)
    assert slots == (TensorSpec("proj_out.weight", (64, 256)), TensorSpec("proj_out.bias", (64,)))
    assert bind_shard(part, slots, checkpoint, 2, 1) == Binding(
        "tail",
        "transformer",
        (
            SlotBinding("proj_out.weight", ("proj_out.weight",)),
            SlotBinding("proj_out.bias", ("proj_out.bias",)),
        ),
    )
