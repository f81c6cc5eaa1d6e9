"""Faults planted in the shards and modules of a split model, and the operation that is named for each."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from fluxkiln.build.parity import record
from fluxkiln.verify.debug.split_match import see_split_leaves
from fluxkiln.verify.debug.split_probe import (
    check_can_be_debugged,
    check_ranks,
    check_shards,
    check_split,
    open_inside,
    whole_state,
)

from fluxkiln.build.context import prepare
from fluxkiln.compile.toolchains.neuron.modules import lower_modules
from fluxkiln.compile.toolchains.neuron.split import runtime_constants, shard_file, shard_weights
from fluxkiln.errors import UsageError
from fluxkiln.export.split import list_split_parts
from fluxkiln.progress import Silent
from fluxkiln.settings import Settings
from fluxkiln.types import find_part
from fluxkiln.verify.debug.diagnosis import debug_part
from tests.builds import altered

pytest.importorskip("jax")

PART = "single.02"


@pytest.fixture(scope="module")
def prepared(tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("split")
    return prepare(
        Settings("trn1", str(tiny_checkpoint().root), components=("transformer",), steps=1, build_dir=folder)
    )


@pytest.fixture(scope="module")
def looked(prepared):
    """One single block on two ranks, opened at its rungs `split` and `replicas`, with the weights and the leaves."""
    from fluxkiln.compile.toolchains.neuron.replicas import Replicas

    kiln = prepared
    part, cut = find_part(kiln.parts, PART), kiln.split.find(PART)
    recording = record(*kiln, prepared.settings, prepared.fingerprint, prepared.folder / "recording")
    inputs = {**runtime_constants(kiln), **recording.inputs(PART, 0)}
    kiln = altered(kiln, parts=(part,), split=replace(kiln.split, parts=(cut,)))
    modules = {
        name: lower_modules(*kiln, Silent(), *more)["single"]
        for name, more in {"split": ("float32",), "replicas": (), "whole": ("bfloat16", 1)}.items()
    }
    state = whole_state(kiln.checkpoint, cut, modules["whole"])
    with ExitStack() as stack:
        workers = {2: stack.enter_context(Replicas(2))}
        inside = open_inside(kiln.checkpoint, kiln.cache, part, cut, modules["replicas"], inputs, workers)
        exact = open_inside(kiln.checkpoint, kiln.cache, part, cut, modules["split"], inputs, workers, "float32")
        outputs = recording.outputs(PART, 0)
        leaves = see_split_leaves(part, kiln.checkpoint, inputs, state)
        yield SimpleNamespace(inside=inside, exact=exact, leaves=leaves, state=state, kiln=kiln, outputs=outputs)


def test_a_sound_part_at_every_rung(prepared):
    found = debug_part(prepared, "tail")
    assert found.culprit is None
    assert [(rung.rung, rung.against) for rung in found.rungs] == [
        ("split", "reference"), ("unsplit", "float32"), ("replicas", "float32"), ("stored", "checkpoint"),
    ]  # fmt: skip
    assert all(rung.findings for rung in found.rungs)
    assert (found.step, found.facts["ranks"]) == (0, "2")


def test_the_shards_of_the_bundle_are_looked_into_where_they_are(prepared, tmp_path):
    for rank, blob in enumerate(shard_weights(*prepared, Silent())["tail"]):
        file = tmp_path / "bundle" / shard_file("tail", rank)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(prepared.path(blob).read_bytes())
    assert rank == 1
    data = bytearray(file.read_bytes())
    data[-1000] ^= 1  # the last bit of an element
    file.write_bytes(data)
    culprit = debug_part(replace(prepared, folder=tmp_path), "tail").culprit
    assert (culprit.rung, culprit.finding.rank) == ("stored", 1)
    assert culprit.slots[0].startswith("proj_out.")


def test_a_sound_block_has_no_culprit(looked):
    split = check_split(looked.exact, looked.leaves, looked.state, looked.outputs)
    assert split.culprit is None
    assert len(split.findings) == 10, "q, k, v, two norms of heads, MLP and its activation, norm, projection, result"
    assert split.noisiest.own < 2e-6
    replicas = check_ranks(looked.inside, None, "replicas")
    assert replicas.culprit is None
    assert len(replicas.findings) > 60
    assert {finding.rank for finding in replicas.findings} == {0, 1}
    assert 1e-3 < replicas.noisiest.own < 5e-3, "bfloat16 rounds, and not by more"
    assert not any(finding.own for finding in check_shards(looked.inside, looked.inside.weights).findings)


def shards_of(looked):
    """Rank -> slot -> its weight, to be spoilt."""
    names = [spec.name for spec in looked.inside.module.slots]
    return [dict(zip(names, map(np.array, rank), strict=True)) for rank in looked.inside.weights]


def double_a_scale(ranks, state):
    ranks[1]["attn.norm_k.weight"][5] *= 2


def swap_biases(ranks, state):
    one, other = "attn.to_k.bias", "attn.to_v.bias"
    ranks[1][one], ranks[1][other] = ranks[1][other], ranks[1][one]


def bias_of_every_rank(ranks, state):
    for rank in ranks:
        rank["proj_out.bias"] = rank["proj_out.bias"] * rank["proj_out.bias"].dtype.type(len(ranks))


def transpose(ranks, state):
    for rank, piece in zip(ranks, np.split(state["attn.to_v.weight"].T, 2), strict=True):
        rank["attn.to_v.weight"] = np.ascontiguousarray(piece).astype(ml_dtypes.bfloat16)


def swap_ranks(ranks, state):
    ranks[0]["proj_mlp.weight"], ranks[1]["proj_mlp.weight"] = ranks[1]["proj_mlp.weight"], ranks[0]["proj_mlp.weight"]


@pytest.mark.parametrize(
    ("spoil", "operation", "slot", "ranks"),
    [
        (double_a_scale, "multiply", "attn.norm_k.weight", {1}),
        (swap_biases, "add", "attn.to_k.bias", {1}),
        (bias_of_every_rank, "add", "proj_out.bias", {0, 1}),
        (transpose, "dot", "attn.to_v.weight", {0, 1}),
        (swap_ranks, "dot", "proj_mlp.weight", {0, 1}),
    ],
)
def test_a_fault_in_a_shard_is_found_at_its_operation(looked, spoil, operation, slot, ranks):
    spoilt = shards_of(looked)
    spoil(spoilt, looked.state)
    weights = [list(rank.values()) for rank in spoilt]
    culprit = check_ranks(looked.inside, weights, "replicas").culprit
    assert (culprit.rung, culprit.operation, culprit.slots) == ("replicas", operation, (slot,))
    assert culprit.finding.missed in ("own", "channel")
    assert culprit.finding.rank in ranks
    assert f"{slot} on rank {', '.join(map(str, sorted(ranks)))}:" in culprit.remedy.cause
    assert culprit.inputs
    assert all(range_.rms > 0 for range_ in culprit.inputs.values())
    stored = check_shards(looked.inside, weights).culprit
    assert (stored.rung, stored.finding.value) == ("stored", culprit.finding.value)


def test_one_bit_of_a_shard_is_seen_where_no_value_shows_it(looked):
    spoilt = shards_of(looked)
    spoilt[0]["proj_mlp.weight"].view(np.uint16)[3, 4] ^= 1
    weights = [list(rank.values()) for rank in spoilt]
    assert check_ranks(looked.inside, weights, "replicas").culprit is None
    culprit = check_shards(looked.inside, weights).culprit
    assert culprit.slots == ("proj_mlp.weight",)
    assert "proj_mlp.weight on rank 0" in culprit.remedy.cause


def lowered(looked, spoil):
    """The part's rung `split` with a module that `spoil` changed."""
    from fluxkiln.compile.toolchains.neuron.canonical import canonicalise
    from fluxkiln.compile.toolchains.neuron.frontend import lower_module
    from fluxkiln.patches.collectives import ThreadRanks
    from fluxkiln.patches.flux1.parallel import build_parallel_part

    kiln = looked.kiln

    def build(collectives):
        made = build_parallel_part("single", kiln.checkpoint.configs, kiln.shapes, collectives)
        spoil(made.module)
        return made

    known = build(ThreadRanks(2))
    proto = lower_module(lambda collectives: build(collectives).module, known.inputs_in("float32"), 2, "float32").proto
    return replace(looked.exact, proto=canonicalise(proto), programs={})


def add_the_bias_before_the_sum(module):
    """As a row-parallel linear that keeps its bias does."""
    sound = module.collectives

    class Spoilt:
        ranks = sound.ranks

        def all_reduce(self, x):
            return sound.all_reduce(x + module.proj_out.bias) - module.proj_out.bias

    module.collectives = Spoilt()


def set_another_epsilon(module):
    module.norm.eps = 1e-2


def test_a_bias_that_every_rank_adds_is_found(looked):
    made = check_split(lowered(looked, add_the_bias_before_the_sum), looked.leaves, looked.state, looked.outputs)
    assert (made.culprit.rung, made.culprit.operation) == ("split", "add")
    assert "proj_out.bias" in made.culprit.slots
    assert "every rank adds the bias" in made.culprit.remedy.cause


def test_another_epsilon_is_found(looked):
    culprit = check_split(lowered(looked, set_another_epsilon), looked.leaves, looked.state, looked.outputs).culprit
    assert (culprit.rung, culprit.operation, culprit.slots) == ("split", "multiply", ())


def test_what_is_not_looked_into_is_said(prepared):
    grouped = next(cut for cut in list_split_parts(prepared.checkpoint.configs, "group:2") if "-" in cut.name)
    with pytest.raises(UsageError, match="2 blocks, and one is looked into at a time; debug it with --granularity"):
        check_can_be_debugged(prepared.checkpoint, grouped)
