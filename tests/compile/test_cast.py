"""Casts against the compiler itself, byte for byte."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fluxkiln.compile import tpu_mlir as adapter
from fluxkiln.compile.bmodel import CANONICAL_TIME, Span, check_codes, hash_span, read_bmodel
from fluxkiln.compile.cast import cast_bmodel, cast_interpreter_weights, cast_region, compare_stored
from fluxkiln.compile.mould import CoefficientMap
from fluxkiln.compile.shell import lay_out, make_shell, write_check_code
from fluxkiln.compile.tpu_mlir import combine
from fluxkiln.components import find_part
from fluxkiln.errors import CompileError
from fluxkiln.export.bindings import bind_part, weight_reader
from fluxkiln.export.synth import synthesize
from fluxkiln.stages import cast_part, make_mould, make_template

pytestmark = pytest.mark.tpu_mlir

NEIGHBOURS = {"t5_block.01": "t5_block.00", "double.01": "double.00", "single.02": "single.00"}
CASES = [
    (name, scheme)
    for scheme, names in {
        "W4BF16,tail=W4BF16": ("t5_block.01", "double.01", "single.02", "tail"),
        "BF16": ("t5_block.01", "double.01", "single.02", "tail"),
        "W8BF16": ("double.01", "single.02"),
    }.items()
    for name in names
]


def reader_of(kiln, name):
    part = find_part(kiln.parts, name)
    template = make_template(kiln, part.kind, "onnx17")
    return weight_reader(bind_part(part, template.slots, kiln.checkpoint), kiln.checkpoint)


def coefficients_of(kiln, mould):
    return CoefficientMap.from_json(json.loads(kiln.path(mould.result.outputs["map"]).read_text()))


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_cast_equals_direct_compile(kiln, cast_and_direct, tmp_path, name, scheme):
    kiln = kiln(scheme=scheme)
    mould, cast, direct = cast_and_direct(kiln, name)
    assert mould.castable, mould.why
    ours, theirs = (kiln.path(part.bmodel).read_bytes() for part in (cast, direct))
    assert CANONICAL_TIME in theirs
    assert ours == theirs
    assert (direct.facts["quantized_matmuls"] > 0) == bool(kiln.scheme(cast.part).weight_bits)
    # what the interpreter reads as well
    with np.load(kiln.path(mould.result.outputs["weights"])) as arrays:
        cast_interpreter_weights(coefficients_of(kiln, mould), reader_of(kiln, name), arrays, tmp_path / "w.npz")
    with np.load(tmp_path / "w.npz") as made, np.load(kiln.path(direct.weights)) as compiled:
        assert set(made.files) == set(compiled.files)
        for array in compiled.files:
            assert made[array].dtype == compiled[array].dtype
            assert made[array].tobytes() == compiled[array].tobytes(), array
    # the control: with another block's weights, nothing of this holds
    if name in NEIGHBOURS:
        coefficients, target = coefficients_of(kiln, mould), tmp_path / "other.bmodel"
        cast_bmodel(kiln.path(mould.result.outputs["bmodel"]), coefficients, reader_of(kiln, NEIGHBOURS[name]),
                    direct.net, target)  # fmt: skip
        one, other = (np.frombuffer(data, np.uint8) for data in (theirs, target.read_bytes()))
        assert np.count_nonzero(one != other) > direct.facts["weight_bytes"] // 3


def test_parts_cast_into_one_file_equal_their_single_files(kiln, cast_and_direct, tpu_mlir, tmp_path):
    """Two threads, two regions of one file; every net has the bytes that the compiler gives it."""
    kiln = kiln()
    direct, maps, shells = {}, {}, []
    for name in ("double.01", "single.02"):
        mould, _, part = cast_and_direct(kiln, name)
        direct[part.net], maps[part.net] = part, coefficients_of(kiln, mould)
        shells.append(tmp_path / f"{part.net}.shell")
        make_shell(kiln.path(mould.result.outputs["bmodel"]), part.net, shells[-1])
    (tmp_path / "combine").mkdir()
    combine(tpu_mlir, "bm1684x", shells, tmp_path / "combine" / "shells", tmp_path / "log")
    target, sizes = tmp_path / "out.bmodel", {net: part.facts["weight_bytes"] for net, part in direct.items()}
    regions = lay_out(tmp_path / "combine" / "shells", sizes, target)

    def cast(net):
        return cast_region(target, regions[net], maps[net], reader_of(kiln, direct[net].part.name))

    with ThreadPoolExecutor(2) as pool:
        for net, code in zip(direct, pool.map(cast, direct), strict=True):
            assert code == hash_span(target, regions[net])
            write_check_code(target, net, code)
    check_codes(target)
    whole = target.read_bytes()
    for net, part in direct.items():
        (single,) = read_bmodel(kiln.path(part.bmodel)).nets
        stored = kiln.path(part.bmodel).read_bytes()[single.coefficients.start : single.coefficients.stop]
        assert whole[regions[net].start : regions[net].stop] == stored
        shares = compare_stored(target, net, maps[net], reader_of(kiln, part.part.name))
        assert not any(share.any() for share in shares.values())
    with pytest.raises(CompileError, match=r"ends at byte \d+ of the coefficients, their region has 4096"):
        cast_region(target, Span(regions[net].start, 4096), maps[net], reader_of(kiln, direct[net].part.name))


def test_second_checkpoint_needs_no_compiler(kiln, cast_and_direct, monkeypatch, tmp_path):
    first = kiln()
    for name in ("double.01", "single.02"):
        cast_and_direct(first, name)

    def refuse(argv, *_):
        raise AssertionError(f"a tool was started: {argv}")

    monkeypatch.setattr(adapter, "run_tool", refuse)
    second = kiln(synthesize("tiny-schnell", tmp_path / "tiny-schnell", seed=1))
    assert second.checkpoint.variant == "schnell"
    for part in second.parts:
        if part.kind in ("double", "single"):
            template = make_template(second, part.kind, "onnx17")
            mould = make_mould(second, template)
            assert mould.result.hit
            made = cast_part(second, part, template, mould)
            check_codes(second.path(made.bmodel))
            dev = cast_part(first, part, make_template(first, part.kind, "onnx17"), mould)
            assert dev.bmodel.size == made.bmodel.size
            assert dev.bmodel.digest != made.bmodel.digest


def test_net_names_of_another_length_are_refused(kiln, cast_and_direct, tmp_path):
    kiln = kiln()
    mould, *_ = cast_and_direct(kiln, "single.02")
    with pytest.raises(CompileError, match=r"'single_100': the mould's name 'single_00' can only be replaced"):
        cast_bmodel(
            kiln.path(mould.result.outputs["bmodel"]), coefficients_of(kiln, mould), reader_of(kiln, "single.02"),
            "single_100", tmp_path / "x.bmodel",
        )  # fmt: skip


def test_the_net_is_renamed_and_the_mould_stays(kiln, cast_and_direct):
    kiln = kiln()
    mould, cast, _ = cast_and_direct(kiln, "single.02")
    assert [net.name for net in read_bmodel(kiln.path(cast.bmodel)).nets] == ["single_02"]
    shell = mould.result.outputs["bmodel"]
    assert [net.name for net in read_bmodel(kiln.path(shell)).nets] == ["single_00"]
    assert kiln.cache.store.read(shell.digest)  # read checks the digest
