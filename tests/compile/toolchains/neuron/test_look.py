"""Faults planted in the shards and modules of a split model, and the operation that is named for each."""

from __future__ import annotations

import functools
from contextlib import ExitStack, suppress
from dataclasses import replace
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from fluxkiln.build.make import build, prepare
from fluxkiln.build.verification import record
from fluxkiln.compile.templates import host_constants
from fluxkiln.compile.toolchains.neuron.look import (
    OpenRanks,
    adds_bias,
    check_rank_shards,
    check_ranks,
    check_size,
    check_split,
    is_partial,
    see_rank_leaves,
)
from fluxkiln.compile.toolchains.neuron.modules import lower_modules
from fluxkiln.compile.toolchains.neuron.rungs import bound_weights
from fluxkiln.compile.toolchains.neuron.split import shard_file
from fluxkiln.digests import digest_bytes, digest_json
from fluxkiln.errors import IntegrityError, ToolchainError, UsageError
from fluxkiln.patches.flux1.kinds import CUTS
from fluxkiln.patches.flux1.model import MODEL
from fluxkiln.patches.parts import Leaf
from fluxkiln.progress import Silent
from fluxkiln.settings import Settings
from fluxkiln.types import find_part
from fluxkiln.verify.debug import debug_part
from fluxkiln.verify.findings import Operation, Tolerance
from fluxkiln.verify.judgement import match_leaves
from tests.hostile.forged import forge

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

    checkpoint, plan, cache = prepared.checkpoint, prepared.plan, prepared.cache
    part = find_part(plan.parts, PART)
    recording = record(prepared)
    plan = replace(plan, parts=(part,))
    inputs = {**host_constants(checkpoint, plan), **recording.inputs(PART, 0)}
    modules = {
        name: lower_modules(checkpoint, plan, cache, Silent(), *more)["single"]
        for name, more in {"split": ("float32",), "replicas": (), "whole": ("bfloat16", 1)}.items()
    }
    (weights,) = bound_weights(checkpoint, part, modules["whole"], "float32")
    state = {spec.name: weight for spec, weight in zip(modules["whole"].slots, weights, strict=True)}
    with ExitStack() as stack:
        workers = {2: stack.enter_context(Replicas(2))}
        protos = {name: cache.path(module.blob).read_bytes() for name, module in modules.items()}
        opened = OpenRanks(checkpoint, part, inputs, workers, modules["replicas"], protos["replicas"])
        exact = OpenRanks(checkpoint, part, inputs, workers, modules["split"], protos["split"], "float32")
        outputs = recording.outputs(PART, 0)
        leaves = see_rank_leaves(part, checkpoint, inputs, state)
        yield SimpleNamespace(opened=opened, exact=exact, leaves=leaves, state=state, plan=plan, outputs=outputs)


def test_a_sound_part_at_every_rung(prepared):
    found = debug_part(prepared, "tail")
    assert found.culprit is None
    assert [(rung.rung, rung.against) for rung in found.rungs] == [
        ("split", "reference"), ("unsplit", "float32"), ("replicas", "float32"), ("stored", "checkpoint"),
    ]  # fmt: skip
    assert all(rung.findings for rung in found.rungs)
    assert (found.step, found.facts["ranks"]) == (0, "2")


def test_the_shards_of_the_bundle_are_looked_into_where_they_are(tiny_checkpoint, tmp_path):
    """One that was damaged is refused, as by every command; one that says of its bytes what they are is looked into."""
    settings = Settings(
        "trn1", str(tiny_checkpoint().root), components=("text_encoder",), steps=1, verify=False,
        build_dir=tmp_path,
    )  # fmt: skip
    with suppress(ToolchainError):  # no neuronx-cc: the rest is there
        build(settings)
    prepared = prepare(settings)
    assert debug_part(prepared, "clip").culprit is None
    bundle = prepared.plan.bundle
    label = shard_file("clip", 0)
    data = bytearray((bundle / label).read_bytes())
    data[-1000] ^= 1  # the last bit of an element
    (bundle / label).unlink()
    (bundle / label).write_bytes(data)
    with pytest.raises(IntegrityError, match=f"{label}: sha256:"):
        debug_part(prepared, "clip")

    def change(document):
        files = {entry["path"]: entry for entry in document["files"]}
        files[label]["sha256"] = digest_bytes(bytes(data)).removeprefix("sha256:")
        (part,) = document["parts"]
        hlo, shard = (f"sha256:{files[path]['sha256']}" for path in (part["file"], label))
        part["digest"] = digest_json({"hlo": hlo, "shards": [shard]})

    forge(bundle, change)
    culprit = debug_part(prepared, "clip").culprit
    assert culprit.rung == "stored"
    assert len(culprit.slots) == 1


def test_a_sound_block_has_no_culprit(looked):
    split = check_split(looked.exact, looked.leaves, looked.state, looked.outputs)
    assert split.culprit is None
    assert len(split.findings) == 10, "q, k, v, two norms of heads, MLP and its activation, norm, projection, result"
    assert split.noisiest.own < 2e-6
    replicas = check_ranks(looked.opened, None, "replicas")
    assert replicas.culprit is None
    assert len(replicas.findings) > 60
    assert {finding.rank for finding in replicas.findings} == {0, 1}
    assert 1e-3 < replicas.noisiest.own < 5e-3, "bfloat16 rounds, and not by more"
    assert not any(finding.own for finding in check_rank_shards(looked.opened, looked.opened.weights).findings)


def shards_of(looked):
    """Rank -> slot -> its weight, to be spoilt."""
    names = [spec.name for spec in looked.opened.module.slots]
    return [dict(zip(names, map(np.array, rank), strict=True)) for rank in looked.opened.weights]


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
    culprit = check_ranks(looked.opened, weights, "replicas").culprit
    assert (culprit.rung, culprit.operation, culprit.slots) == ("replicas", operation, (slot,))
    assert culprit.finding.missed in ("own", "channel")
    assert culprit.finding.rank in ranks
    assert f"{slot} on rank {', '.join(map(str, sorted(ranks)))}:" in culprit.remedy.cause
    assert culprit.inputs
    assert all(range_.rms > 0 for range_ in culprit.inputs.values())
    stored = check_rank_shards(looked.opened, weights).culprit
    assert (stored.rung, stored.finding.value) == ("stored", culprit.finding.value)


def test_one_bit_of_a_shard_is_seen_where_no_value_shows_it(looked):
    spoilt = shards_of(looked)
    spoilt[0]["proj_mlp.weight"].view(np.uint16)[3, 4] ^= 1
    weights = [list(rank.values()) for rank in spoilt]
    assert check_ranks(looked.opened, weights, "replicas").culprit is None
    culprit = check_rank_shards(looked.opened, weights).culprit
    assert culprit.slots == ("proj_mlp.weight",)
    assert "proj_mlp.weight on rank 0" in culprit.remedy.cause


def lowered(looked, spoil):
    """The part's rung `split` with a module that `spoil` changed."""
    from fluxkiln.compile.toolchains.neuron.frontend import lower_module
    from fluxkiln.compile.toolchains.neuron.hlo_module import canonicalise
    from tests.ranks import ThreadRanks

    def build(collectives):
        part, configs = looked.exact.part, looked.exact.checkpoint.configs
        made = MODEL.build_parallel_part(part, configs, looked.plan.shapes, collectives)
        spoil(made.module)
        return made

    known = build(ThreadRanks(2))
    proto = lower_module(lambda collectives: build(collectives).module, known.inputs_in("float32"), 2, "float32").proto
    return replace(looked.exact, proto=canonicalise(proto))


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
    parts = MODEL.list_split_parts(prepared.checkpoint.configs, "group:2", "kl")
    grouped = next(part for part in parts if "-" in part.name)
    with pytest.raises(UsageError, match="2 blocks, and one is looked into at a time; debug it with --granularity"):
        check_size(prepared.checkpoint, grouped)


def match(operations, whole, ranks):
    """The finding of one linear of a double block whose weight is cut by rows."""
    partial = functools.partial(is_partial, operations, CUTS["double"])
    bounds = Tolerance(1e-5, 1e-4, 1e-5)
    (finding,) = match_leaves([Leaf("ff.net.2", "Linear", whole, None)], operations, ranks, bounds, partial)
    return finding


@pytest.mark.parametrize("on_every_rank", [False, True])
def test_partial_sums_are_added_with_the_bias_that_they_have(on_every_rank):
    """Before the reduction, whatever the reduction then does to two linears at once."""
    random = np.random.default_rng(0)
    parts, bias = [random.standard_normal((1, 5, 8)) for _ in range(2)], random.standard_normal(8)
    whole = sum(parts) + bias
    operations = [
        Operation("dot", "dot", ("x",), ("ff.net.2.weight",)),
        Operation("add", "add", ("dot",), ("ff.net.2.bias",)),
        Operation("sum", "all-reduce", ("add",)),
    ]
    ranks = [{"dot": part, "add": part + bias * (on_every_rank or not rank)} for rank, part in enumerate(parts)]
    finding, leaf = match(operations, whole, ranks), Leaf("ff.net.2", "Linear", whole, None)
    assert (finding.value, finding.missed) == ("add", "own" if on_every_rank else "")
    together = sum(rank["add"] for rank in ranks)
    assert adds_bias(finding, leaf, together, bias, 2) == on_every_rank
    assert not adds_bias(finding, leaf, together, bias + 1, 2)


def test_what_was_reduced_is_whole_on_every_rank():
    whole = np.random.default_rng(0).standard_normal((1, 5, 8))
    operations = [
        Operation("dot", "dot", ("x",), ("ff.net.2.weight",)),
        Operation("sum", "all-reduce", ("dot",)),
        Operation("add", "add", ("sum",), ("ff.net.2.bias",)),
    ]
    finding = match(operations, whole, [{"add": whole} for _ in range(2)])
    assert (finding.value, finding.missed) == ("add", "")
