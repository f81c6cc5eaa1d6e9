"""The way a large model is verified, forced upon the tiny one; each corruption is found at the block it is in."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import replace

import pytest

from fluxkiln.build import verification
from fluxkiln.build.budget import Limits, executed_parts
from fluxkiln.build.make import prepare
from fluxkiln.build.prepared import Prepared
from fluxkiln.build.verification import record, verify
from fluxkiln.compile import rungs
from fluxkiln.compile.plan import Made
from fluxkiln.compile.templates import make_template
from fluxkiln.compile.tensors import multiplications
from fluxkiln.compile.toolchain import toolchain_of
from fluxkiln.compile.toolchains.tpu_mlir import rungs as chip_rungs
from fluxkiln.compile.toolchains.tpu_mlir.moulds import cast_part, make_mould
from fluxkiln.errors import CheckpointError, CompileError
from fluxkiln.patches.flux1.kinds import list_parts
from fluxkiln.progress import Laps, Silent
from fluxkiln.settings import Settings
from fluxkiln.types import Shapes, find_part
from fluxkiln.verify.gates import first_bad_rung
from fluxkiln.verify.ladder import explain_failure

SMALL = Shapes(height=16, width=16, tokens=8)
AT = " at 32x32"


class Told(Silent):
    """Keeps what was reported."""

    def __init__(self):
        self.announced, self.lines = {}, []

    def stage(self, name, total):
        self.announced[name] = total if isinstance(total, int) else len(total)

    def done(self, stage, what, how):
        self.lines.append((stage, what, how))


def prepared_of(build, folder, settings):
    plan = replace(build.plan, folder=folder)
    return Prepared(settings, build.checkpoint, plan, build.cache, "tiny", "tiny")


def made_of(prepared):
    context = prepared.checkpoint, prepared.plan, prepared.cache
    return toolchain_of(prepared.plan.target).make(*context, prepared.settings, Silent(), Laps())


class Large:
    """tiny-dev with limits so low that it counts as large."""

    def __init__(self, build, folder, scheme="W4BF16", component=None, parts=None):
        checkpoint, plan, cache = build(scheme=scheme, target="cpu") if callable(build) else build
        if component is not None:
            parts = tuple(part for part in plan.parts if part.component == component)
            checkpoint = replace(checkpoint, tensors={component: checkpoint.tensors[component]})
        self.settings = Settings(plan.target.name, str(checkpoint.root), scheme=scheme)
        plan = replace(plan, folder=folder, parts=parts or plan.parts)
        self.prepared = Prepared(self.settings, checkpoint, plan, cache, "tiny", "tiny")
        self.limits = Limits(replayed=multiplications(checkpoint, SMALL), executed=1e9, blocks=1)
        self.made = made_of(self.prepared) if plan.target.name == "cpu" else Made((), ())
        self.recording = record(self.prepared, self.limits)

    @property
    def parts(self):
        return self.prepared.plan.parts

    @property
    def chosen(self):
        """The parts that are executed at the shapes of the build."""
        one = self.prepared
        return [part.name for part in executed_parts(one.checkpoint, one.plan, one.cache, 0, self.limits)]

    def verify(self, parts=None, made=None, progress=None, limits=None, **settings):
        plan = replace(self.prepared.plan, parts=parts or self.parts)
        prepared = replace(self.prepared, plan=plan, settings=replace(self.settings, **settings))
        parity = verification._verify_large(
            prepared, made or self.made, self.recording, prepared.plan.folder / "work", progress or Silent(),
            limits or self.limits,
        )  # fmt: skip
        return parity, first_bad_rung(parity.ladder.rows)


@pytest.fixture(scope="module")
def large(small_build, tmp_path_factory):
    return Large(small_build, tmp_path_factory.mktemp("large"))


@pytest.fixture(scope="module")
def sound(large):
    told = Told()
    return *large.verify(progress=told), told


def chosen_block(large, kind):
    return next(name for name in large.chosen if find_part(large.parts, name).kind == kind)


def test_one_step_at_smaller_shapes_is_recorded(large):
    assert large.recording.shapes == SMALL
    assert large.recording.steps == 1
    assert tuple(large.recording.calls) == tuple(part.name for part in large.parts)
    assert {len(calls) for calls in large.recording.calls.values()} == {1}


def test_a_sound_model_passes(large, sound):
    parity, bad, _ = sound
    assert bad == {}
    assert explain_failure(parity.ladder.rows) == ""
    assert parity.recording is large.recording
    assert parity.pipeline_rung == "onnxruntime"
    assert parity.pipeline.image.shape == (16, 16, 3)


def test_every_part_is_replayed_and_some_are_executed_at_the_shapes_of_the_build(large, sound):
    parity, _, _ = sound
    rungs_of = {}
    for row in parity.ladder.rows:
        rungs_of.setdefault(row.part, []).append(row.rung)
    chosen = large.chosen
    assert list(rungs_of) == [
        *(part.name for part in large.parts), *(f"{name}{AT}" for name in chosen), "pipeline",
    ]  # fmt: skip
    assert {"double", "single", "t5_block", "vae_decoder"} <= {name.split(".")[0] for name in chosen}
    for part, made in rungs_of.items():
        expected = ["dequantized", "executed"] if AT in part else ["patched", "onnxruntime", "dequantized"]
        assert list(dict.fromkeys(made)) == (["onnxruntime"] if part == "pipeline" else expected)
    for row in parity.ladder.rows:
        assert (row.vs_reference.delta_cosine is not None) == row.kind.startswith(("double", "single", "t5_block"))


def test_the_report_is_told_what_ran_where(large, sound):
    parity, _, told = sound
    facts = parity.facts
    assert facts["every part replayed at"] == "16x16, 8 tokens, 1 step"
    assert chosen_block(large, "single") in facts["compiled form executed at 32x32, 16 tokens"].split(", ")
    assert facts["compiled form not executed, too large"] == "none"
    verified = [what for stage, what, _ in told.lines if stage == "verify"]
    assert len(verified) == told.announced["verify"] == len(set(verified))
    assert f"{chosen_block(large, 'double')}{AT}" in verified


def test_what_is_too_large_is_left_out_and_said(large):
    parity, _ = large.verify(limits=replace(large.limits, executed=1e6))
    assert parity.facts["compiled form not executed, too large"].split(", ")[-1] == "vae_decoder"
    assert "vae_decoder" in {row.part for row in parity.ladder.rows}, "at the smaller shapes it is replayed"
    assert f"vae_decoder{AT}" not in {row.part for row in parity.ladder.rows}


def test_further_images_are_made_at_the_smaller_shapes(large):
    parity, _ = large.verify(seeds=(1, 2), steps=3)
    runs = parity.runs
    assert (runs["rung"], runs["shapes"], runs["steps"]) == ("onnxruntime", "16x16, 8 tokens", 3)
    assert [entry["seed"] for entry in runs["entries"]] == [1, 2]
    rows = [row for row in parity.ladder.rows if row.part.startswith("pipeline.")]
    assert len(rows) == 4
    assert all(row.passed for row in rows)


def swap(parts, one, other):
    """The parts, two of which have the weights of one another."""
    prefixes = {part.name: part.prefix for part in parts}
    prefixes[one], prefixes[other] = prefixes[other], prefixes[one]
    return tuple(replace(part, prefix=prefixes[part.name]) for part in parts)


@pytest.mark.parametrize(
    ("one", "other"), [("double.00", "double.01"), ("single.01", "single.02"), ("t5_block.00", "t5_block.01")]
)
def test_swapped_blocks_are_found(large, one, other):
    _, bad = large.verify(swap(large.parts, one, other))
    assert {name: rung for name, rung in bad.items() if AT not in name} == {
        one: "patched", other: "patched", "pipeline": "onnxruntime",
    }  # fmt: skip
    assert {name.removesuffix(AT) for name in bad if AT in name} <= {one, other}


def test_weights_of_another_block_at_one_rung_are_found(large, monkeypatch):
    find = rungs.find_part
    swapped = {"single.01": "single.02"}
    monkeypatch.setattr(rungs, "find_part", lambda parts, name: find(parts, swapped.get(name, name)))
    _, bad = large.verify()
    assert bad == {"single.01": "onnxruntime", "pipeline": "onnxruntime"}


def test_blocks_in_the_wrong_order_are_found(large):
    """Each has its own weights and is sound; only the whole pipeline shows it."""
    parts = list(large.parts)
    places = [index for index, part in enumerate(parts) if part.kind == "double"]
    parts[places[0]], parts[places[1]] = parts[places[1]], parts[places[0]]
    _, bad = large.verify(tuple(parts))
    assert bad == {"pipeline": "onnxruntime"}


def test_a_bundle_with_the_graph_of_another_block_is_found(large):
    chosen = chosen_block(large, "single")
    graphs = large.made.own
    other = next(name for name in graphs if name.startswith("single.") and name != chosen)
    _, bad = large.verify(made=replace(large.made, own={**graphs, chosen: graphs[other]}))
    assert bad == {f"{chosen}{AT}": "executed"}


def test_without_quantization_the_bundles_graphs_are_the_onnxruntime_rung(small_build, tmp_path):
    plain = Large(small_build, tmp_path, scheme="BF16")
    parity, bad = plain.verify()
    assert bad == {}
    assert {row.rung for row in parity.ladder.rows if AT in row.part} == {"onnxruntime"}
    assert {row.rung for row in parity.ladder.rows} == {"patched", "onnxruntime"}


def test_both_forms_of_the_transformer_are_verified(small_build, tmp_path):
    """The one that the fixtures do not make: blocks with their modulation as an input, or with their AdaLN linears."""
    model = small_build(scheme="W4BF16", target="cpu")
    other = "hoisted" if any(part.kind == "head" for part in model.parts) else "inline"
    parts = list_parts(model.checkpoint.configs, modulation=other)
    both = Large(model, tmp_path, parts=parts)
    parity, bad = both.verify()
    assert bad == {}
    kinds = {row.kind for row in parity.ladder.rows if AT in row.part}
    assert kinds >= ({"single_modulated", "single_modulation"} if other == "hoisted" else {"single", "head"})


@pytest.mark.parametrize("component", ["text_encoder_2", "transformer", "vae"])
def test_a_component_is_verified_alone(small_build, tmp_path, component):
    """There is no whole pipeline then; the random numbers in place of the others' outputs do as well for a part."""
    alone = Large(small_build, tmp_path, component=component)
    told = Told()
    parity, bad = alone.verify(progress=told)
    assert bad == {}
    assert parity.pipeline is None
    assert {row.part for row in parity.ladder.rows} == {
        *(part.name for part in alone.parts), *(f"{name}{AT}" for name in alone.chosen)
    }  # fmt: skip
    assert sum(stage == "verify" for stage, *_ in told.lines) == told.announced["verify"]
    if component == "transformer":
        _, bad = alone.verify(swap(alone.parts, "single.00", "single.01"))
        assert bad.keys() >= {"single.00", "single.01"}
        assert bad["single.00"] == "patched"


def test_a_small_models_component_is_replayed_alone(small_build, tmp_path):
    model = small_build(scheme="BF16", target="cpu")
    parts = tuple(part for part in model.parts if part.component == "text_encoder_2")
    small = prepared_of(model, tmp_path, Settings("cpu", str(model.checkpoint.root), scheme="BF16"))
    small = replace(small, plan=replace(small.plan, parts=parts))
    parity = verify(small, made_of(small), record(small), tmp_path / "work", Silent())
    assert explain_failure(parity.ladder.rows) == ""
    assert parity.pipeline is None
    assert {row.part for row in parity.ladder.rows} == {part.name for part in parts}


@pytest.mark.parametrize("modulation", ["inline", "hoisted"])
def test_every_call_of_the_whole_pipeline_is_told_as_announced(small_build, tmp_path, modulation):
    """What is left of it is told by these calls; hoisted modulations run once for all steps."""
    model, told = small_build(scheme="BF16", target="cpu"), Told()
    root, store = str(model.checkpoint.root), model.cache.store.root
    small = prepare(Settings("cpu", root, modulation=modulation, steps=2, build_dir=tmp_path, store=store))
    parity = verify(small, made_of(small), record(small), tmp_path / "work", told)
    assert explain_failure(parity.ladder.rows) == ""
    for stage in ("verify", "pipeline"):
        assert told.announced[stage] == sum(line[0] == stage for line in told.lines) > len(small.plan.parts)
    assert told.announced["pipeline"] < told.announced["verify"] or modulation == "inline"


def test_a_failure_does_not_wait_for_what_is_executed(large, monkeypatch):
    """At full size a block is interpreted for most of a minute."""
    begun, gone, saw_it_go = threading.Event(), threading.Event(), []

    def run(part, inputs):
        begun.set()
        saw_it_go.append(gone.wait(20))
        raise CompileError("the process ended")

    @contextmanager
    def process(*_):
        try:
            yield {"executed": run}
        finally:
            gone.set()

    def fail(*_):
        assert begun.wait(20)
        raise CheckpointError("a shard has gone")

    monkeypatch.setattr(type(toolchain_of(large.prepared.plan.target)), "execute", process)
    monkeypatch.setattr(verification, "_replay_small", fail)
    with pytest.raises(CheckpointError, match="a shard has gone"):
        large.verify()
    assert saw_it_go == [True]


@pytest.mark.tpu_mlir
@pytest.mark.parametrize("spoilt", [False, True])
def test_compiled_blocks_are_interpreted(small_build, tmp_path, monkeypatch, spoilt):
    """A block cast from the weights of another is found at the interpreter, which no other rung has to do with."""
    build = small_build(scheme="W4BF16", target="bm1684x")
    compiled = Large(build, tmp_path)
    name, source = "single.01", "single.02" if spoilt else "single.01"
    mould = make_mould(*build, make_template(*build, "single", "onnx17"))
    binary, part = cast_part(build.plan, find_part(build.parts, source), mould), find_part(build.parts, name)
    if spoilt:  # what was cast for the one is taken for the other
        lay_out = chip_rungs.lay_out_lowered

        def lay_out_other(checkpoint, plan, cache, given, folder):
            lay_out(checkpoint, plan, cache, replace(given, part=binary.part), folder)

        monkeypatch.setattr(chip_rungs, "lay_out_lowered", lay_out_other)
    monkeypatch.setattr(verification, "executed_parts", lambda *_: (part,))
    parity, bad = compiled.verify(made=Made((replace(binary, part=part),), ()))
    assert bad == ({f"{name}{AT}": "interpreter"} if spoilt else {})
    rows = [row for row in parity.ladder.rows if AT in row.part]
    assert [row.rung for row in rows] == ["dequantized", "interpreter"]
    assert parity.facts["compiled form not executed, too large"].split(", ")[:2] == ["clip", "t5_embed"]
    assert not (tmp_path / "work" / "lowered").exists(), "a part's files go when it is done"
