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
from fluxkiln.compile.plan import BundleFile, Made
from fluxkiln.compile.rungs import look_below
from fluxkiln.compile.templates import make_template
from fluxkiln.compile.toolchains.tpu_mlir import cast as own_cast
from fluxkiln.compile.toolchains.tpu_mlir import integers
from fluxkiln.compile.toolchains.tpu_mlir.cast import read_map
from fluxkiln.compile.toolchains.tpu_mlir.executors import Simulator
from fluxkiln.compile.toolchains.tpu_mlir.forms import (
    BIAS,
    CODES,
    MULTIPLIER,
    Form,
    FormMaker,
    integer_candidates,
    likely_shifts,
    whole_rows,
)
from fluxkiln.compile.toolchains.tpu_mlir.graphs import add_side_tensors
from fluxkiln.compile.toolchains.tpu_mlir.integers import (
    ask_for_integers,
    check_integers,
    same_but_for_shifts,
    set_multipliers,
)
from fluxkiln.compile.toolchains.tpu_mlir.moulds import compile_part, make_mould, prove_cast
from fluxkiln.compile.toolchains.tpu_mlir.rungs import check_lowered, lay_out_lowered, open_stored
from fluxkiln.compile.toolchains.tpu_mlir.toolchain import TOOLCHAIN
from fluxkiln.compile.weights import part_statistics, part_weights
from fluxkiln.errors import CompileError, SchemeError
from fluxkiln.export.bindings import bind_part, weight_reader
from fluxkiln.progress import Silent
from fluxkiln.quantize.calibration import Calibration
from fluxkiln.quantize.integer import INPUT_SCALE, OUTPUT_SCALE, integer_multipliers, pack_integer
from fluxkiln.quantize.side_tensors import GAINS, RECIPROCALS, side_slot, split_slot
from fluxkiln.settings import Settings, read_prompts
from fluxkiln.types import Shapes, find_part
from fluxkiln.verify.gates import first_bad_rung
from fluxkiln.verify.metrics import compare
from tests.builds import Build, altered, chip_ladder, opened_rungs
from tests.quantize.weights import make_weight

NAME, OTHER = "single.00", "single.01"
SHAPES = Shapes(height=32, width=32, tokens=16)
WEIGHT, BIAS_VALUES = make_weight("student", (96, 64)), make_weight("gaussian", (96,))
TOP = """    %0 = "top.None"() : () -> none loc(#loc)
    %1 = "top.Input"(%arg0) {} : (tensor<1x4xf32>) -> tensor<1x4xf32> loc(#loc1)
    %2 = "top.Weight"() : () -> tensor<4x4xf32> loc(#loc2)
    %3 = "top.MatMul"(%1, %2, %0) {output_transpose = false} : (tensor<1x4xf32>) -> tensor<1x4xf32> loc(#loc3)
    %4 = "top.MatMul"(%3, %2, %0) {output_transpose = false} : (tensor<1x4xf32>) -> tensor<1x4xf32> loc(#loc4)
#loc1 = loc("x")
#loc2 = loc("w")
#loc3 = loc("first")
#loc4 = loc("second")
"""
LOWERED = """    %5 = "tpu.MatMul"(%1, %2, %0, %3, %0) {{multipliers = [1, 2], rshifts = [9, 9]}} : (tensor<1x4x!quant.uniform<i8:bf16, 2.0>>, tensor<4x2xi8>, none, tensor<2xsi32>, none) -> tensor<1x2x!quant.uniform<{0}:f32, 0.5>> loc(#loc5)
#loc5 = loc("first")
"""  # noqa: E501  # as the compiler writes it


def test_what_the_compiler_is_told(tmp_path):
    (tmp_path / "top.mlir").write_text(TOP)
    arguments = ask_for_integers(tmp_path, {"first"}, "BF16")
    lines = (tmp_path / "top.mlir").read_text().splitlines()
    assert [line.count("output_int16 = true") for line in lines][3:5] == [1, 0]
    assert (tmp_path / "table").read_text() == "x BF16\nsecond BF16\n"
    thresholds = (tmp_path / arguments[arguments.index("--calibration_table") + 1]).read_text()
    assert thresholds == "".join(f"{name} 256.0 -256.0 256.0\n" for name in ("x", "first", "second"))


def test_products_of_8_bits_are_missed():
    assert check_integers(LOWERED.format("i16"), 1, "net") == (1, 8)
    with pytest.raises(CompileError, match="1 of 1 matmuls take 8 bits and 0 of them hand on 16"):
        check_integers(LOWERED.format("i8"), 1, "net")
    with pytest.raises(CompileError, match="1 of 2 matmuls take 8 bits"):
        check_integers(LOWERED.format("i16"), 2, "net")


def test_the_interpreter_gets_the_multipliers_of_the_weights():
    made = set_multipliers(LOWERED.format("i16"), {"first_multi_int32": np.array([7, 8], np.int32)})
    assert made == LOWERED.format("i16").replace("[1, 2]", "[7, 8]")
    with pytest.raises(CompileError, match="has no first_multi_int32"):
        set_multipliers(LOWERED.format("i16"), {})


def shifted(*numbers: int) -> list[int]:
    """Bytes as instructions have them: left shifts."""
    return [-number % 256 for number in numbers]


def test_shells_may_differ_in_shifts_alone(tmp_path):
    (tmp_path / "ours").write_bytes(bytes(shifted(1, 25, 3, 25, 26, 9)))

    def same(*theirs: int) -> bool:
        (tmp_path / "theirs").write_bytes(bytes(shifted(*theirs)))
        return same_but_for_shifts(tmp_path / "ours", tmp_path / "theirs", [(25, 24), (25, 25), (26, 23)])

    assert same(1, 24, 3, 25, 23, 9)
    assert not same(1, 25, 3, 25, 23, 9)
    assert not same(1, 24, 3, 25, 22, 9)
    assert not same(1, 24, 3, 25, 23, 8)
    assert not same(1, 24, 3, 25, 23, 9, 0)


def test_forms_of_a_weight():
    rows = {"w": whole_rows(WEIGHT), "b": whole_rows(BIAS_VALUES)}
    maker = FormMaker(0, 8, rows_of=rows.__getitem__)
    bias = maker.make(Form("b", BIAS, weight="w"), rows["b"]).view(np.int32)
    packed = pack_integer(WEIGHT)
    np.testing.assert_array_equal(maker.make(Form("w", CODES), rows["w"]).view(np.int8), packed.codes_OI.T.ravel())
    np.testing.assert_allclose(bias * packed.scales_O * INPUT_SCALE, BIAS_VALUES.astype(float), atol=INPUT_SCALE * 2e-3)
    multiplier = maker.make(Form("w", MULTIPLIER, shift=25), rows["w"]).view(np.int32)
    np.testing.assert_allclose(multiplier / 2**25, packed.scales_O * INPUT_SCALE / OUTPUT_SCALE, rtol=1e-5)
    np.testing.assert_allclose(packed.dequantize(), WEIGHT.astype(np.float32), atol=float(packed.scales_O.max()) / 2)
    names = [form.name for form in integer_candidates("w", (96, 64), {"w": packed.scales_O})]
    assert (names[0], set(names[1:]), len(names)) == (CODES, {MULTIPLIER}, 1 + len(likely_shifts(packed.scales_O)))
    (form,) = integer_candidates("b", (96,), {"w": packed.scales_O, "v": packed.scales_O[:3]})
    assert form == Form("b", BIAS, weight="w")


def test_a_multiplier_that_does_not_fit_is_refused():
    scales = pack_integer(WEIGHT).scales_O
    shift = likely_shifts(scales)[-1]
    assert integer_multipliers(scales, shift, "w").max() > 2**30
    with pytest.raises(SchemeError, match=r"w needs the multiplier .* at shift \d+, and a multiplier has 32 bits"):
        integer_multipliers(scales * 2, shift, "w")


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
