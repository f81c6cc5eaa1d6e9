"""T5 on virtual ranks gives what transformers' own, unsplit, gives; and what must not pass does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fluxkiln.errors import CheckpointError, PatchError, UsageError
from fluxkiln.export.bindings import apply_transforms, bind_shard, split_slots
from fluxkiln.export.checkpoint import read_tensor
from fluxkiln.patches.flux1.inputs import position_buckets
from fluxkiln.patches.flux1.kinds import list_split_parts
from fluxkiln.patches.flux1.model import MODEL
from fluxkiln.patches.flux1.parallel import build_parallel_part
from fluxkiln.types import Shapes, TensorRef
from tests.ranks import ThreadRanks, load_parallel_part

BOUND = 5e-6
# longer than the 128 positions beyond which all fall into the last bucket
SHAPES = Shapes(height=32, width=32, tokens=160)


def relative(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def encode(config, weights, dtype=torch.float32):
    """transformers' own encoder, unsplit: token ids -> last hidden state."""
    from transformers import T5Config, T5EncoderModel

    model = T5EncoderModel(T5Config(**config))
    model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()}, strict=False)
    with torch.no_grad():
        return model.eval().to(dtype)(token_ids(config), return_dict=False)[0]


def token_ids(config):
    draw = torch.Generator().manual_seed(11)
    return torch.randint(config["vocab_size"], (1, SHAPES.tokens), generator=draw, dtype=torch.int32)


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint):
    checkpoint = tiny_checkpoint()
    tensors = checkpoint.tensors["text_encoder_2"].values()
    return checkpoint, {ref.name: read_tensor(ref).astype(np.float32) for ref in tensors}


@pytest.fixture(scope="module")
def four_heads(tiny):
    """One block of four heads, weights drawn here."""
    checkpoint, _ = tiny
    config = {**checkpoint.configs["text_encoder_2"], "num_heads": 4, "num_layers": 1}
    from transformers import T5Config, T5EncoderModel

    with torch.device("meta"):
        model = T5EncoderModel(T5Config(**config))
    draw = np.random.default_rng(5)
    weights = {
        name: (draw.standard_normal(tuple(weight.shape)) * weight.shape[-1] ** -0.5).astype(np.float32)
        for name, weight in model.named_parameters()
    }
    refs = {name: TensorRef(name, Path("none"), "F32", value.shape, 0, 0) for name, value in weights.items()}
    configs = {**checkpoint.configs, "text_encoder_2": config}
    return replace(checkpoint, configs=configs, tensors={"text_encoder_2": refs}), weights


def shards_of(model, ranks):
    checkpoint, weights = model
    part = next(part for part in list_split_parts(checkpoint.configs) if part.name == "t5")
    slots = split_slots(MODEL, part, checkpoint.configs, ranks)
    bindings = [bind_shard(part, slots, checkpoint, ranks, rank) for rank in range(ranks)]
    return [
        {
            slot.slot: torch.from_numpy(apply_transforms(weights[slot.sources[0]], slot.transforms))
            for slot in binding.slots
        }
        for binding in bindings
    ]


def run(model, ranks, *, group=None, dtype=torch.float32, shards=None):
    """The last hidden state of every rank."""
    group = group or ThreadRanks(ranks)
    configs = model[0].configs
    config = configs["text_encoder_2"]
    inputs = token_ids(config), torch.from_numpy(position_buckets(config, SHAPES.tokens))
    modules = []
    for weights in shards or shards_of(model, ranks):
        part = build_parallel_part("t5", configs, SHAPES, group)
        assert [spec.shape for spec in part.inputs] == [tuple(value.shape) for value in inputs]
        assert {spec.dtype for spec in part.inputs_in("bfloat16")} == {"int32"}
        modules.append(load_parallel_part(part, {slot: weight.to(dtype) for slot, weight in weights.items()}))
    return group.run([lambda module=module: module(*inputs) for module in modules])


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_rank_gives_transformers_hidden_state(tiny, ranks):
    checkpoint, weights = tiny
    config = checkpoint.configs["text_encoder_2"]
    group = ThreadRanks(ranks)
    states = run(tiny, ranks, group=group)
    expected = encode(config, weights)
    for state in states:
        assert relative(state, expected) <= BOUND
        assert torch.equal(state, states[0])
    assert group.counts == {"all_reduce": 2 * config["num_layers"]}
    assert build_parallel_part("t5", checkpoint.configs, SHAPES, group).all_reduces == group.counts["all_reduce"]


@pytest.mark.parametrize("ranks", [4, 8])
def test_heads_of_zeros_change_nothing(four_heads, ranks):
    checkpoint, weights = four_heads
    expected = encode(checkpoint.configs["text_encoder_2"], weights)
    for state in run(four_heads, ranks):
        assert relative(state, expected) <= BOUND


def test_position_bias_is_transformers_own_and_cut_by_heads(tiny):
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    checkpoint, weights = tiny
    config = checkpoint.configs["text_encoder_2"]
    table = weights["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    buckets = position_buckets(config, SHAPES.tokens)
    assert buckets.dtype == np.int32
    assert set(buckets.ravel()) == set(range(32)) - {16}, "every bucket but `0 behind`, which no pair has"
    attention = T5Attention(T5Config(**config), has_relative_attention_bias=True, layer_idx=0)
    attention.relative_attention_bias.weight = torch.nn.Parameter(torch.from_numpy(table))
    bias = attention.compute_bias(SHAPES.tokens, SHAPES.tokens)[0].detach()
    mine = [
        shard["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] for shard in shards_of(tiny, 2)
    ]
    for rank, columns in enumerate(mine):
        assert columns.shape == (32, 1)
        assert torch.equal(columns[torch.from_numpy(buckets)][..., 0], bias[rank])


def test_bfloat16_on_ranks_is_as_near_as_transformers_own(tiny):
    """Two orders of summation differ as much as each differs from float32, so both are measured against that."""
    checkpoint, weights = tiny
    config = checkpoint.configs["text_encoder_2"]
    exact = encode(config, weights)
    rounding = relative(encode(config, weights, torch.bfloat16), exact)
    first, second = run(tiny, 2, dtype=torch.bfloat16)
    assert torch.equal(first, second)
    assert first.dtype == torch.bfloat16
    assert 1e-3 < rounding < 0.1
    assert relative(first, exact) < 1.15 * rounding


def test_a_rank_with_the_shard_of_another_is_seen(tiny):
    checkpoint, weights = tiny
    shards = shards_of(tiny, 2)
    expected = encode(checkpoint.configs["text_encoder_2"], weights)
    states = run(tiny, 2, shards=[shards[0], shards[0]])
    assert relative(states[0], expected) > 100 * BOUND


def test_a_reduction_left_out_is_seen(tiny):
    class Forgetful(ThreadRanks):
        def all_reduce(self, x):
            return x

    checkpoint, weights = tiny
    expected = encode(checkpoint.configs["text_encoder_2"], weights)
    states = run(tiny, 2, group=Forgetful(2))
    assert min(relative(state, expected) for state in states) > 100 * BOUND


def test_what_cannot_be_built_is_refused_in_words(tiny, monkeypatch):
    configs = tiny[0].configs
    with pytest.raises(UsageError, match=r"DenseReluDense.wi_0.weight has 256 entries, which 3 ranks cannot share"):
        build_parallel_part("t5", configs, SHAPES, ThreadRanks(3))
    other = {**configs, "text_encoder_2": {**configs["text_encoder_2"], "feed_forward_proj": "relu"}}
    with pytest.raises(CheckpointError, match="gated-gelu"):
        build_parallel_part("t5", other, SHAPES, ThreadRanks(2))
    from transformers.models.t5.modeling_t5 import T5Attention

    monkeypatch.setattr(T5Attention, "_relative_position_bucket", staticmethod(lambda position: position))
    with pytest.raises(PatchError, match="parallel_t5"):
        build_parallel_part("t5", configs, SHAPES, ThreadRanks(2))
