"""W8A8 in a bmodel: against its own arithmetic, the compiler itself, and with each number of it spoilt."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from fluxkiln.build.calibration import DEFAULT_PROMPTS, calibrate
from fluxkiln.build.make import prepare
from fluxkiln.compile.integers import integer_template
from fluxkiln.compile.onnx.filled import weight_matmuls
from fluxkiln.compile.onnx.scores import find_scores
from fluxkiln.compile.plan import BundleFile, Made
from fluxkiln.compile.rungs import dequantized_rung, look_below
from fluxkiln.compile.templates import make_template
from fluxkiln.compile.toolchains.tpu_mlir import cast as own_cast
from fluxkiln.compile.toolchains.tpu_mlir import integers
from fluxkiln.compile.toolchains.tpu_mlir.cast import read_map
from fluxkiln.compile.toolchains.tpu_mlir.executors import Simulator
from fluxkiln.compile.toolchains.tpu_mlir.forms import (
    MULTIPLIER,
)
from fluxkiln.compile.toolchains.tpu_mlir.graphs import add_side_tensors
from fluxkiln.compile.toolchains.tpu_mlir.moulds import compile_part, make_mould, prove_cast
from fluxkiln.compile.toolchains.tpu_mlir.rungs import check_lowered, lay_out_lowered, open_stored
from fluxkiln.compile.toolchains.tpu_mlir.toolchain import TOOLCHAIN
from fluxkiln.compile.weights import part_statistics, part_weights
from fluxkiln.errors import CompileError, SchemeError
from fluxkiln.export.bindings import bind_part, weight_reader
from fluxkiln.progress import Silent
from fluxkiln.quantize.calibration import Calibration
from fluxkiln.quantize.side_tensors import GAINS, RECIPROCALS, side_slot, split_slot
from fluxkiln.settings import Settings, read_prompts
from fluxkiln.types import Shapes, find_part
from fluxkiln.verify.gates import first_bad_rung
from fluxkiln.verify.metrics import compare
from tests.builds import Build, altered, chip_ladder, opened_rungs

NAME, OTHER = "single.00", "single.01"
SHAPES = Shapes(height=32, width=32, tokens=16)


@pytest.fixture(scope="module")
def prepared(tiny_checkpoint, tmp_path_factory):
    """(scheme) -> a build of tiny-dev's first single block in the hoisted form, all with one store."""
    folder = tmp_path_factory.mktemp("integers")

    def make(scheme="W8A8", modulation="hoisted") -> Build:
        found = prepare(
            Settings(
                "bm1684x", str(tiny_checkpoint().root), scheme=scheme, build_dir=folder / "build",
                store=folder / "store", modulation=modulation,
            )
        )  # fmt: skip
        made = Build(found.checkpoint, found.plan, found.cache)
        return altered(made, parts=(find_part(made.parts, NAME),))

    return make


def made_settings(made):
    """Settings of a build of the whole checkpoint, with the same store."""
    folder = made.plan.folder.parents[1]
    return Settings("bm1684x", str(made.checkpoint.root), scheme="W8A8", build_dir=folder, store=made.cache.store.root)


def template_of(made):
    return make_template(*made, made.parts[0].kind, "onnx17")


def test_what_stands_in_the_way_is_said(prepared):
    with pytest.raises(SchemeError, match=r"single.00 is to be W8A8, .* leave --modulation inline out"):
        TOOLCHAIN.check(*prepared(modulation="inline"))


def test_scales_of_channels_go_into_the_modulation(prepared, tmp_path):
    """The rows of the modulation are scaled, and what is as wide as the tokens only where there are none."""
    import onnx

    made = prepared()
    template, scheme = template_of(made), made.plan.scheme(made.parts[0])
    form = add_side_tensors(template, scheme, tmp_path / "sided.onnx")
    graph = onnx.load(form.path).graph
    added = [spec.name for spec in form.slots[len(template.slots) :]]
    assert [split_slot(slot)[1] for slot in added] == [RECIPROCALS] * 3 + [GAINS]
    # q, k, v and the MLP's inputs; attention's; the GELU's; the products that are gated
    readers = {slot: [node for node in graph.node if slot in node.input] for slot in added}
    assert [len(nodes) for nodes in readers.values()] == [2, 1, 1, 1]
    rows = {node.input[0] for slot in (added[0], added[-1]) for node in readers[slot]}
    assert len(rows) == 3
    shapes = {value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim] for value in graph.value_info}
    assert all(shapes[name][-2] == 1 for name in rows)
    plain = sum(one.op_type == "Mul" for one in onnx.load(template.path).graph.node)
    # three of rows and two of tokens; the modulation's own product is replaced
    assert sum(one.op_type == "Mul" for one in graph.node) == plain + 3 + 2


def test_the_graph_in_integers_has_every_product(prepared, tmp_path):
    import onnx

    made = prepared()
    template, scheme = template_of(made), made.plan.scheme(made.parts[0])
    form, biases = integer_template(template, scheme, tmp_path / "integer.onnx")
    graph = onnx.load(form.path).graph
    coded = weight_matmuls(template.path, {spec.name for spec in template.inputs})
    assert sum(node.op_type == "MatMulInteger" for node in graph.node) == len(coded) == 6
    assert len(biases) == 5  # of q, k, v, proj_out and proj_mlp
    # attention is no product with a weight
    assert sum(node.op_type == "MatMul" for node in graph.node) == 2


@pytest.fixture(scope="module")
def calibrated(prepared):
    """The store of these builds gets a calibration."""
    made = prepared()
    settings = Settings(
        "bm1684x", str(made.checkpoint.root), build_dir=made.plan.folder.parents[1],
        store=made.cache.store.root, steps=2,
    )  # fmt: skip
    return calibrate(settings, read_prompts(DEFAULT_PROMPTS)[:4], block=64)


def test_a_build_wants_a_calibration(prepared):
    made = prepared()
    with pytest.raises(SchemeError, match=r"single.00 is to be stored as W8A8, which needs calibration, and the store"):
        part_weights(*made, made.parts[0], template_of(made))


def test_a_row_is_the_same_alone_as_in_the_whole(prepared, calibrated):
    made = prepared()
    weights = part_weights(*made, made.parts[0], template_of(made))
    for slot in ("attn.to_q.weight__t", "proj_out.weight__s1.256.1280__t"):
        whole = weights(slot)
        pieces = [weights.read_rows(slot, start, start + 64) for start in range(0, len(whole), 64)]
        assert np.concatenate(pieces).tobytes() == whole.tobytes()


def test_what_a_product_cannot_hold_is_refused(prepared, calibrated, monkeypatch):
    made = prepared()
    known = part_statistics(*made, made.parts[0])
    known.check_products("attn.to_q.weight__t")
    monkeypatch.setattr(Calibration, "outputs", lambda *_: np.array([1.0, 300.0], np.float32))
    with pytest.raises(
        SchemeError, match=r"products of .*attn.to_q.weight reach 300 in the calibration, W8A8 holds 256"
    ):
        known.check_products("attn.to_q.weight__t")


def test_what_a_gate_takes_over_is_not_refused(prepared, calibrated, monkeypatch):
    """Products that are multiplied by a row may be of any size: the row is larger by a power of two."""
    made = prepared()
    known = part_statistics(*made, made.parts[0])
    slots = ("proj_out.weight__s1.0.256__t", "proj_out.weight__s1.256.1280__t")
    monkeypatch.setattr(Calibration, "outputs", lambda *_: np.array([0.0, 1.0, 63.0, 65.0, 5000.0], np.float32))
    np.testing.assert_array_equal(known.gains(slots), [2**-4, 2**-4, 1, 2, 128])
    monkeypatch.undo()
    weights, plain = part_weights(*made, made.parts[0], template_of(made)), bound(made)
    gains = weights(side_slot(slots[0], GAINS)).astype(np.float32)
    assert gains.tobytes() == weights(side_slot(slots[1], GAINS)).astype(np.float32).tobytes()
    assert set(np.frexp(gains)[0]) == {0.5}
    np.testing.assert_array_equal(weights("proj_out.bias").astype(np.float32) * gains, plain("proj_out.bias"))
    rest = weights(slots[0]).astype(np.float32) * gains[:, None]
    rest *= weights(side_slot(slots[0], RECIPROCALS)).astype(np.float32)
    np.testing.assert_allclose(rest, plain(slots[0]).astype(np.float32), rtol=2**-7)


def bound(made):
    return weight_reader(bind_part(made.parts[0], template_of(made).slots, made.checkpoint), made.checkpoint)


@pytest.fixture(scope="module")
def compiled(prepared, calibrated, cast_alone):
    made = prepared()
    return made, make_mould(*made, template_of(made)), cast_alone(made, NAME)


@pytest.mark.tpu_mlir
def test_the_chip_computes_in_these_integers(compiled, record_parts, tmp_path, monkeypatch):
    made, mould, binary = compiled
    facts, (part,) = mould.result.facts, made.parts
    assert facts["quantized_matmuls"] == 6
    inputs = record_parts("tiny-dev", made.parts, SHAPES).inputs(NAME, 0)
    base = inputs["hidden_states"]
    files = (BundleFile("x.bmodel", binary.blobs["bmodel"], (NAME,)),)
    with opened_rungs(made, (binary,), files, tmp_path) as rungs:
        out = {rung: runner(NAME, inputs)["hidden_states_out"] for rung, runner in rungs.items()}
        for rung in ("interpreter", "simulator"):
            assert compare(out[rung], out["dequantized"], base).delta_cosine >= 0.999
        # what a calibration of one step and 20 tokens leaves; how little W8A8 can leave is another matter
        assert compare(out["dequantized"], out["onnxruntime"], base).delta_cosine >= 0.95
        ladder = chip_ladder()
        TOOLCHAIN.read_back(ladder, *made, Made((binary,), files))
        assert first_bad_rung(ladder.rows) == {}
        # the controls: an input's limit at twice its size, another block's channel scales, half a gate
        # without its gains
        sound = part_weights(*made, part, template_of(made))
        other = part_weights(*made, find_part(prepare(made_settings(made)).plan.parts, OTHER), template_of(made))
        for role, spoil in (
            (RECIPROCALS, lambda slot: sound(slot).astype(np.float32) * 2),
            (RECIPROCALS, other),
            (GAINS, lambda slot: np.where(np.arange(len(sound(slot))) % 2, 1, sound(slot).astype(np.float32))),
        ):
            spoilt = _Spoilt(sound, role, spoil)
            monkeypatch.setattr(own_cast, "part_weights", lambda *_, spoilt=spoilt: spoilt)
            rungs["interpreter"].close()
            wrong = rungs["interpreter"](NAME, inputs)["hidden_states_out"]
            assert compare(wrong, out["dequantized"], base).delta_cosine < 0.999
    # and a shift that is off by one: the bytes are not those of this mould
    monkeypatch.undo()
    moved = replace_shifts(read_map(made.cache, mould.result.outputs["map"]), 1)
    source = own_cast.cast_source(*made, part)
    file = made.cache.path(binary.blobs["bmodel"])
    differing = own_cast.compare_stored(file, binary.net, moved, *source)
    assert {slot for slot, shares in differing.items() if shares.any()} == {
        placement.form.slot for placement in moved.binary if placement.form.name == MULTIPLIER
    }


def replace_shifts(coefficients, step):
    def moved(placement):
        form = placement.form
        return replace(placement, form=replace(form, shift=form.shift + step)) if form.shift else placement

    return replace(coefficients, binary=tuple(map(moved, coefficients.binary)))


class _Spoilt:
    """Weights as they are, with what stands beside them in one role changed."""

    def __init__(self, sound, role, spoil):
        self.sound, self.role, self.spoil = sound, role, spoil

    def __call__(self, slot):
        return self.read_rows(slot, 0, None)

    def read_rows(self, slot, start, stop):
        found = self.sound(slot)
        if split_slot(slot)[1] == self.role:
            found = np.asarray(self.spoil(slot)).astype(found.dtype)
        return found[start:stop]


@pytest.mark.tpu_mlir
def test_the_compiler_makes_the_same_of_it(compiled):
    made, mould, binary = compiled
    direct = compile_part(*made, made.parts[0], template_of(made))
    proven = prove_cast(binary, direct, *made, mould)
    assert proven.made.startswith("cast, compiled: identical")
    with pytest.raises(CompileError, match="weights differ from what the compiler makes"):
        prove_cast(replace(binary, digest="sha256:" + "0" * 64), direct, *made, mould)


@pytest.mark.tpu_mlir
@pytest.mark.thorough
def test_products_of_8_bits_end_a_compile(prepared, calibrated, monkeypatch):
    """The control: an option that the compiler drops."""
    made = prepared("W8A8,single.attn.to_q=BF16")
    monkeypatch.setattr(integers, "_WIDE", "output_transpose = false")
    with pytest.raises(CompileError, match="of them hand on 16, W8A8 asks for all"):
        make_mould(*made, template_of(made))


@pytest.mark.tpu_mlir
def test_debug_names_a_shift_that_is_off_by_one(compiled, record_parts, tpu_mlir, tmp_path):
    made, _, binary = compiled
    (part,), folder = made.parts, tmp_path / "lowered"
    opened = open_stored(*made, part, record_parts("tiny-dev", made.parts, SHAPES).inputs(NAME, 0))
    below = look_below(opened, made.checkpoint, Silent())
    assert [(rung.rung, rung.culprit) for rung in below] == [("onnxruntime", None), ("dequantized", None)]
    lay_out_lowered(*made, binary, folder, lean=False)
    lowered = folder / "lowered.mlir"
    with Simulator(tpu_mlir, "bm1684x", tmp_path / "log") as simulator:
        sound = check_lowered(opened, lowered, simulator)
        assert sound.culprit is None
        assert len(sound.findings) > 20
        text = lowered.read_text()
        product = next(integers._PRODUCT.finditer(text))
        moved = re.sub(r"rshifts = \[(\d+)", lambda found: f"rshifts = [{int(found[1]) + 1}", product[0])
        assert moved != product[0]
        lowered.write_text(text.replace(product[0], moved))
        culprit = check_lowered(opened, lowered, simulator).culprit
    place = dict(integers._LOCATION.findall(text))[product["loc"]]
    assert culprit is not None
    assert place.rpartition("_")[0] == culprit.finding.value


@pytest.mark.parametrize("kind", ["single_modulated", "double_modulated"])
def test_what_queries_and_keys_are_multiplied_by_is_found(prepared, kind):
    made = prepared()
    template = make_template(*made, kind, "onnx17")
    (found,) = find_scores(template.path, {spec.name for spec in template.inputs})
    streams = ("", "added_")[: 1 + (kind == "double_modulated")]
    names = {f"attn.norm_{stream}{role}.weight" for stream in streams for role in "qk"}
    assert {slot.partition("__")[0] for slot in found.norms} == names


@pytest.fixture(scope="module")
def attended(prepared, calibrated, cast_alone):
    """The block with queries and keys in integers too."""
    made = prepared("W8A8-qk")
    return made, make_mould(*made, template_of(made)), cast_alone(made, NAME)


@pytest.mark.tpu_mlir
def test_queries_and_keys_are_multiplied_in_integers(attended, prepared, record_parts, tmp_path, monkeypatch):
    made, mould, binary = attended
    part = made.parts[0]
    inputs = record_parts("tiny-dev", made.parts, SHAPES).inputs(NAME, 0)
    base = inputs["hidden_states"]
    files = (BundleFile("x.bmodel", binary.blobs["bmodel"], (NAME,)),)
    with opened_rungs(made, (binary,), files, tmp_path) as rungs:
        out = {rung: runner(NAME, inputs)["hidden_states_out"] for rung, runner in rungs.items()}
        for rung in ("interpreter", "simulator"):
            assert compare(out[rung], out["dequantized"], base).delta_cosine >= 0.999
        with_scores = compare(out["dequantized"], out["onnxruntime"], base)
        plain = dequantized_rung(*prepared())(NAME, inputs)["hidden_states_out"]
        assert not np.array_equal(plain, out["dequantized"])
        without = compare(plain, out["onnxruntime"], base)
        assert with_scores.delta_relative_l2 < 1.2 * without.delta_relative_l2
        # the control: norms that make queries and keys larger than their limit
        sound = part_weights(*made, part, template_of(made))
        norms = [spec.name for spec in template_of(made).slots if "norm_" in spec.name]
        spoilt = _Larger(sound, norms)
        monkeypatch.setattr(own_cast, "part_weights", lambda *_: spoilt)
        rungs["interpreter"].close()
        wrong = rungs["interpreter"](NAME, inputs)["hidden_states_out"]
        assert compare(wrong, out["dequantized"], base).delta_cosine < 0.999
    monkeypatch.undo()
    direct = compile_part(*made, part, template_of(made))
    assert prove_cast(binary, direct, *made, mould).made.startswith("cast, compiled: identical")


@pytest.mark.tpu_mlir
def test_debug_follows_queries_and_keys_in_integers(attended, record_parts, tpu_mlir, tmp_path):
    made, _, binary = attended
    opened = open_stored(*made, made.parts[0], record_parts("tiny-dev", made.parts, SHAPES).inputs(NAME, 0))
    assert [rung.culprit for rung in look_below(opened, made.checkpoint, Silent())] == [None, None]
    lay_out_lowered(*made, binary, tmp_path / "lowered", lean=False)
    with Simulator(tpu_mlir, "bm1684x", tmp_path / "log") as simulator:
        found = check_lowered(opened, tmp_path / "lowered" / "lowered.mlir", simulator)
    (scores,) = find_scores(template_of(made).path, {spec.name for spec in template_of(made).inputs})
    assert scores.output in {finding.value for finding in found.findings}
    assert found.culprit is None


class _Larger(_Spoilt):
    """Weights as they are, but for some slots' twice as large."""

    def __init__(self, sound, slots):
        super().__init__(sound, "", None)
        self.slots = slots

    def read_rows(self, slot, start, stop):
        found = self.sound(slot)
        return (found.astype(np.float32) * (1 + (slot in self.slots))).astype(found.dtype)[start:stop]


@pytest.mark.tpu_mlir
@pytest.mark.thorough
def test_a_view_without_its_producers_threshold_ends_a_compile(prepared, calibrated, monkeypatch):
    """The control: views have the limit, what they are views of has that of all other values."""
    made = prepared("W8A8-qk4")
    monkeypatch.setattr(integers, "_VIEWS", frozenset())
    with pytest.raises(CompileError, match="wants its producer's threshold"):
        make_mould(*made, template_of(made))


def test_norms_that_make_more_than_the_limit_are_refused(prepared, calibrated):
    made = prepared("W8A8-qk1")
    with pytest.raises(SchemeError, match=r"with attn.norm_.\.weight.*, W8A8-qk1 holds 1; ask for W8A8-qk\d"):
        part_weights(*made, made.parts[0], template_of(made))
