"""The transformer on virtual ranks gives what diffusers' own, unsplit, gives; and what must not pass does not."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fluxkiln.errors import CheckpointError, PatchError, UsageError
from fluxkiln.export.bindings import apply_transforms, bind_shard, split_slots
from fluxkiln.export.checkpoint import Checkpoint, read_tensor
from fluxkiln.patches.cut import SilentRanks
from fluxkiln.patches.flux1 import parallel
from fluxkiln.patches.flux1.inputs import rotary_embedding
from fluxkiln.patches.flux1.kinds import list_split_parts
from fluxkiln.patches.flux1.model import MODEL
from fluxkiln.patches.flux1.parallel import build_parallel_part, modulation_rows
from fluxkiln.types import Shapes, TensorRef
from tests.ranks import ThreadRanks, load_parallel_part

BOUND = 5e-6
SHAPES = Shapes(height=64, width=64, tokens=32)


def relative(found: Tensor, expected: Tensor) -> float:
    """Relative L2 error."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@dataclass
class Model:
    """A checkpoint, its transformer's weights, and one step of it: inputs, and what diffusers makes of them."""

    checkpoint: Checkpoint
    weights: Mapping[str, np.ndarray]
    step: dict[str, Tensor]
    expected: Tensor

    @property
    def configs(self):
        return self.checkpoint.configs

    def shards(self, name, ranks, granularity="block"):
        """Weights of every rank of the part called `name`, as the bindings cut them."""
        part = next(part for part in list_split_parts(self.configs, granularity) if part.name == name)
        slots = split_slots(MODEL, part, self.configs, ranks)
        bindings = [bind_shard(part, slots, self.checkpoint, ranks, rank) for rank in range(ranks)]
        return [
            {
                slot.slot: torch.from_numpy(apply_transforms(self.weights[slot.sources[0]], slot.transforms))
                for slot in binding.slots
            }
            for binding in bindings
        ]


def reference(model, step: dict[str, Tensor]) -> Tensor:
    """diffusers' own forward, unsplit; positions as the pipeline makes them."""
    from diffusers import FluxPipeline

    rows, columns = SHAPES.height // 16, SHAPES.width // 16
    image_ids = FluxPipeline._prepare_latent_image_ids(1, rows, columns, torch.device("cpu"), torch.float32)
    given = {name: value for name, value in step.items() if not name.startswith("rotary")}
    with torch.no_grad():
        return model(**given, img_ids=image_ids, txt_ids=torch.zeros(SHAPES.tokens, 3), return_dict=False)[0]


def one_step(configs) -> dict[str, Tensor]:
    """Inputs of a step. Timestep and guidance are exact in bfloat16 even times 1000, the embedding of others is not."""
    flux = configs["transformer"]
    draw = torch.Generator().manual_seed(7)
    rotary = rotary_embedding(flux, SHAPES)
    return {
        "hidden_states": torch.randn(1, SHAPES.image_tokens, flux["in_channels"], generator=draw),
        "encoder_hidden_states": torch.randn(1, SHAPES.tokens, flux["joint_attention_dim"], generator=draw),
        "pooled_projections": torch.randn(1, flux["pooled_projection_dim"], generator=draw),
        "timestep": torch.tensor([0.5]),
        **({"guidance": torch.tensor([4.0])} if flux["guidance_embeds"] else {}),
        **{name: torch.from_numpy(value) for name, value in rotary.items()},
    }


def open_model(checkpoint: Checkpoint, weights: Mapping[str, np.ndarray]) -> Model:
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(dict(checkpoint.configs["transformer"]))
    state = {name: torch.from_numpy(value) for name, value in weights.items()}
    model.load_state_dict(state, assign=True)
    step = one_step(checkpoint.configs)
    return Model(checkpoint, weights, step, reference(model.eval(), step))


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint):
    """preset -> its model in float32."""
    made: dict[str, Model] = {}

    def make(preset="tiny-dev"):
        if preset not in made:
            checkpoint = tiny_checkpoint(preset)
            tensors = checkpoint.tensors["transformer"].values()
            made[preset] = open_model(checkpoint, {ref.name: read_tensor(ref).astype(np.float32) for ref in tensors})
        return made[preset]

    return make


@pytest.fixture(scope="module")
def four_heads(tiny_checkpoint):
    """A transformer of one double and one single block with four heads, weights and biases drawn here."""
    checkpoint = tiny_checkpoint()
    sizes = {"num_attention_heads": 4, "num_layers": 1, "num_single_layers": 1}
    configs = {**checkpoint.configs, "transformer": {**checkpoint.configs["transformer"], **sizes}}
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        shapes = {
            name: tuple(weight.shape)
            for name, weight in FluxTransformer2DModel.from_config(configs["transformer"]).named_parameters()
        }
    draw = np.random.default_rng(5)
    weights = {
        name: (draw.standard_normal(shape) * (0.3 if len(shape) == 1 else shape[-1] ** -0.5)).astype(np.float32)
        for name, shape in shapes.items()
    }
    refs = {name: TensorRef(name, Path("none"), "F32", shape, 0, 0) for name, shape in shapes.items()}
    return open_model(replace(checkpoint, configs=configs, tensors={"transformer": refs}), weights)


def dropped(weights, dtype):
    return {slot: weight.to(dtype) for slot, weight in weights.items()}


def run_whole(model, ranks, *, group=None, dtype=torch.float32, shards=None, step=None, biased=False):
    """The sample of every rank from one module for all parts, and the group with its counts."""
    group = group or ThreadRanks(ranks)
    shards = shards or model.shards("transformer", ranks, "whole")
    parts = [build_parallel_part("transformer", model.configs, SHAPES, group) for _ in range(ranks)]
    modules = [load_parallel_part(*pair) for pair in zip(parts, (dropped(s, dtype) for s in shards), strict=True)]
    given = {**model.step, **(step or {})}
    specs = parts[0].inputs_in(str(dtype).removeprefix("torch."))
    inputs = [given[spec.name].to(getattr(torch, spec.dtype)) for spec in specs]
    return group.run([lambda module=module: module(*inputs) for module in modules]), group


def run_parts(model, ranks):
    """The sample of every rank from one module per block, the host between them; and the group with its counts."""
    group, configs = ThreadRanks(ranks), model.configs
    flux, rows = configs["transformer"], modulation_rows(configs)
    rotary = model.step["rotary_cos"], model.step["rotary_sin"]

    def run(name, kind, *inputs):
        """One part on all ranks; `inputs` per rank."""
        modules = [
            load_parallel_part(build_parallel_part(kind, configs, SHAPES, group), weights)
            for weights in model.shards(name, ranks)
        ]
        outputs = group.run([lambda r=r: modules[r](*(value[r] for value in inputs)) for r in range(ranks)])
        outputs = [value if isinstance(value, tuple) else (value,) for value in outputs]
        return list(zip(*outputs, strict=True))

    def same(value):
        return [value] * ranks

    head = [spec.name for spec in build_parallel_part("head", configs, SHAPES, group).inputs]
    image, text, modulation = run("head", "head", *(same(model.step[name]) for name in head))

    def of(name):
        return [value[:, slice(*rows[name])] for value in modulation]

    for i in range(flux["num_layers"]):
        name = f"double.{i:02d}"
        image, text = run(name, "double", image, text, of(name), *map(same, rotary))
    joint = [torch.cat(both, dim=1) for both in zip(text, image, strict=True)]
    for i in range(flux["num_single_layers"]):
        name = f"single.{i:02d}"
        (joint,) = run(name, "single", joint, of(name), *map(same, rotary))
    (sample,) = run("tail", "tail", [value[:, SHAPES.tokens :] for value in joint], of("tail"))
    return sample, group


@pytest.mark.parametrize(("preset", "ranks"), [("tiny-dev", 1), ("tiny-dev", 2), ("tiny-dev", 4), ("tiny-schnell", 2)])
def test_every_rank_gives_diffusers_sample(tiny, preset, ranks):
    """Four ranks share two heads: two of them have heads of zeros only."""
    model = tiny(preset)
    samples, group = run_whole(model, ranks)
    for sample in samples:
        assert relative(sample, model.expected) <= BOUND
        assert torch.equal(sample, samples[0])
    flux = model.configs["transformer"]
    assert group.counts == {"all_reduce": 2 * flux["num_layers"] + flux["num_single_layers"], "all_gather": 1}


def test_block_by_block_is_the_whole_bit_for_bit(tiny):
    model = tiny()
    chained, group = run_parts(model, 2)
    whole, counted = run_whole(model, 2)
    assert group.counts == counted.counts
    assert relative(chained[0], model.expected) <= BOUND
    for one, other in zip(chained, whole, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("ranks", [4, 8])
def test_heads_of_zeros_change_nothing(four_heads, ranks):
    samples, _ = run_whole(four_heads, ranks)
    shard = four_heads.shards("double.00", ranks)[-1]
    assert bool(shard["attn.to_q.weight"].any()) == (ranks == 4), "the last of eight ranks has no head of its own"
    for sample in samples:
        assert relative(sample, four_heads.expected) <= BOUND


@pytest.mark.parametrize("kind", ["double", "single"])
def test_a_group_of_blocks_is_the_blocks_one_after_the_other(tiny, kind):
    model, ranks, draw = tiny(), 2, torch.Generator().manual_seed(3)
    group = ThreadRanks(ranks)
    parts = [build_parallel_part(kind, model.configs, SHAPES, group, blocks=2) for _ in range(ranks)]
    assert parts[0].all_reduces == 2 * build_parallel_part(kind, model.configs, SHAPES, group).all_reduces
    given = {spec.name: torch.randn(spec.shape, generator=draw) for spec in parts[0].inputs}
    given |= {name: model.step[name] for name in ("rotary_cos", "rotary_sin")}
    shards = model.shards(f"{kind}.00-01", ranks, "group:2")
    modules = [load_parallel_part(*pair) for pair in zip(parts, shards, strict=True)]
    together = group.run([lambda m=m: m(*(given[spec.name] for spec in parts[0].inputs)) for m in modules])
    streams = given["hidden_states"], given.get("encoder_hidden_states")
    for i, rows in enumerate(given["modulation"].split(given["modulation"].shape[1] // 2, dim=1)):
        single = [build_parallel_part(kind, model.configs, SHAPES, group) for _ in range(ranks)]
        modules = [
            load_parallel_part(*pair) for pair in zip(single, model.shards(f"{kind}.{i:02d}", ranks), strict=True)
        ]
        values = {**given, "hidden_states": streams[0], "encoder_hidden_states": streams[1], "modulation": rows}
        ordered = [values[spec.name] for spec in single[0].inputs]
        (found, _) = group.run([lambda m=m, v=ordered: m(*v) for m in modules])
        streams = found if isinstance(found, tuple) else (found, None)
    first = together[0] if isinstance(together[0], tuple) else (together[0], None)
    assert torch.equal(first[0], streams[0])
    assert first[1] is None or torch.equal(first[1], streams[1])


def test_bfloat16_on_ranks_is_as_near_as_bfloat16_unsplit(tiny):
    """Two orders of summation differ as much as each differs from float32, so both are measured against that."""
    model = tiny()
    (unsplit,), _ = run_whole(model, 1, dtype=torch.bfloat16)
    samples, _ = run_whole(model, 2, dtype=torch.bfloat16)
    rounding = relative(unsplit, model.expected)
    assert samples[0].dtype == torch.bfloat16
    assert torch.equal(samples[0], samples[1])
    assert 1e-3 < rounding < 0.03
    assert relative(samples[0], model.expected) < 1.15 * rounding
    assert relative(samples[0], unsplit) < 1.15 * rounding


def test_splitting_adds_little_to_what_diffusers_loses_in_bfloat16(tiny):
    """diffusers rounds timestep and guidance too, and loses far more by it than all the rest together."""
    from diffusers import FluxTransformer2DModel

    model = tiny()
    step = {**model.step, "timestep": torch.tensor([0.37]), "guidance": torch.tensor([3.5])}
    with torch.device("meta"):
        upstream = FluxTransformer2DModel.from_config(dict(model.configs["transformer"]))
    state = {name: torch.from_numpy(value).bfloat16() for name, value in model.weights.items()}
    upstream.load_state_dict(state, assign=True)
    rounded = reference(upstream.eval(), {name: value.bfloat16() for name, value in step.items()})
    (exact,), _ = run_whole(model, 1, step=step)
    (unsplit,), _ = run_whole(model, 1, dtype=torch.bfloat16, step=step)
    samples, _ = run_whole(model, 2, dtype=torch.bfloat16, step=step)
    assert relative(samples[0], unsplit) < 0.25 * relative(rounded, exact)


# Negative controls: each of these is a mistake that is easily made, and the bound must see it.


def test_a_bias_added_on_every_rank_is_seen(tiny):
    """A bias in front of the reduction is summed once per rank; here by scaling the biases of what is reduced."""
    model, ranks = tiny(), 2
    shards = model.shards("transformer", ranks, "whole")
    behind = ("to_out.0.bias", "to_add_out.bias", "net.2.bias", "proj_out.bias")
    tail = str(max(int(slot.split(".")[0]) for slot in shards[0])) + ".proj_out.bias"
    for shard in shards:
        for slot in shard:
            if slot.endswith(behind) and slot != tail:
                assert shard[slot].abs().max() > 0, "a bias of zero would hide the mistake"
                shard[slot] = shard[slot] * ranks
    samples, _ = run_whole(model, ranks, shards=shards)
    assert relative(samples[0], model.expected) > 100 * BOUND


def test_a_rank_with_the_shard_of_another_is_seen(tiny):
    model = tiny()
    shards = model.shards("transformer", 2, "whole")
    samples, _ = run_whole(model, 2, shards=[shards[0], shards[0]])
    assert relative(samples[0], model.expected) > 100 * BOUND


@pytest.mark.parametrize("left_out", range(7))
def test_a_reduction_left_out_is_seen(tiny, left_out):
    """On all ranks, each of the seven in turn: two of each double block and one of each single block."""

    class Forgetful(ThreadRanks):
        def __init__(self, ranks):
            super().__init__(ranks)
            self.mine = threading.local()

        def all_reduce(self, x):
            self.mine.calls = getattr(self.mine, "calls", -1) + 1
            return x if self.mine.calls == left_out else super().all_reduce(x)

    model = tiny()
    samples, group = run_whole(model, 2, group=Forgetful(2))
    assert group.counts["all_reduce"] == 6
    assert max(relative(sample, model.expected) for sample in samples) > 100 * BOUND


def test_a_time_embedding_in_bfloat16_is_seen(tiny):
    """The angle of 0.37 x 1000 x frequency in 8 bits; the fixture's own timestep would survive it."""
    model = tiny()
    exact, _ = run_whole(model, 1, step={"timestep": torch.tensor([0.37])})
    rounded, _ = run_whole(model, 1, step={"timestep": torch.tensor([0.37]).bfloat16().float()})
    assert relative(rounded[0], exact[0]) > 100 * BOUND


# What the parts are.


def test_modulation_rows_follow_one_another(tiny):
    configs = tiny().configs
    rows = modulation_rows(configs)
    assert rows["double.01"] == (12, 24)
    assert rows["single.00"] == (24, 27)
    assert rows["tail"] == (33, 35)
    head = build_parallel_part("head", configs, SHAPES, SilentRanks(1))
    assert head.outputs[-1] == "modulation"
    assert (head.all_reduces, head.all_gathers) == (0, 1)


@pytest.mark.parametrize("kind", parallel.PARALLEL_KINDS)
def test_parts_are_structure_only_and_hold_the_checkpoint_once(tiny, kind):
    configs = tiny().configs
    part = build_parallel_part(kind, configs, SHAPES, ThreadRanks(2))
    assert {tensor.device.type for tensor in (*part.module.parameters(), *part.module.buffers())} == {"meta"}
    assert not any(weight.requires_grad for weight in part.module.parameters())
    assert not part.module.training
    assert [spec.name for spec in part.slots] == [name for name, _ in part.module.named_parameters()]
    in_bf16 = {spec.name: spec.dtype for spec in part.inputs_in("bfloat16")}
    assert all(dtype == "float32" for name, dtype in in_bf16.items() if name in parallel.FLOAT32_INPUTS)
    assert not [name for name, dtype in in_bf16.items() if dtype == "float32" and name not in parallel.FLOAT32_INPUTS]


def test_full_size_parts_have_the_shapes_of_one_of_eight_ranks():
    from fluxkiln.patches.flux1.presets import PRESETS

    configs = PRESETS["full-dev"].configs
    sizes = {}
    for kind in ("head", "double", "single", "tail"):
        part = build_parallel_part(kind, configs, Shapes(1024, 1024, 512), ThreadRanks(8))
        sizes[kind] = sum(int(np.prod(spec.shape)) for spec in part.slots)
    single = {spec.name: spec.shape for spec in part_of("single", configs, 8).slots}
    assert single["proj_out.weight_attention"] == (3072, 384)
    assert single["proj_out.weight_mlp"] == (3072, 1536)
    gigabytes = 2e-9 * (sizes["head"] + 19 * sizes["double"] + 38 * sizes["single"] + sizes["tail"])
    assert 2.97 < gigabytes < 3.1
    padded = {spec.name: spec.shape for spec in part_of("double", configs, 16).slots}
    assert padded["attn.to_q.weight"] == (2 * 128, 3072), "24 heads on 16 ranks are 32"
    assert padded["attn.to_out.0.weight"] == (3072, 2 * 128)


def part_of(kind, configs, ranks):
    return build_parallel_part(kind, configs, SHAPES, ThreadRanks(ranks))


def test_what_cannot_be_built_is_refused_in_words(tiny, monkeypatch):
    configs = tiny().configs
    with pytest.raises(UsageError, match=r"1024 entries, which 3 ranks cannot share evenly; use a tp degree that div"):
        part_of("single", configs, 3)
    with pytest.raises(UsageError, match=r"1536 entries, which 7 ranks cannot"):
        part_of("head", configs, 7)
    with pytest.raises(UsageError, match=r"'tripel'; there are t5, head, double"):
        part_of("tripel", configs, 2)
    with pytest.raises(UsageError, match="2 blocks in a part of kind head"):
        build_parallel_part("head", configs, SHAPES, SilentRanks(1), blocks=2)
    from diffusers.models.transformers import transformer_flux

    monkeypatch.setattr(transformer_flux.FluxTransformerBlock, "forward", lambda self: None)
    with pytest.raises(PatchError, match="parallel_double_block"):
        part_of("double", configs, 2)


def test_weights_of_another_number_of_ranks_are_refused(tiny):
    model = tiny()
    weights = model.shards("tail", 2)[0]
    with pytest.raises(CheckpointError, match=r"proj_out.bias is missing or unexpected"):
        load_parallel_part(part_of("tail", model.configs, 2), {"proj_out.weight": weights["proj_out.weight"]})
    with pytest.raises(CheckpointError, match=r"this rank's is .*shard the checkpoint again"):
        load_parallel_part(part_of("single", model.configs, 1), model.shards("single.00", 2)[0])
