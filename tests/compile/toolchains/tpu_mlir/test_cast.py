"""Casts against the compiler itself, byte for byte."""

from __future__ import annotations

import hashlib
import json
import shutil
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from fluxkiln.compile.templates import make_template
from fluxkiln.compile.toolchains.tpu_mlir import compiler as adapter
from fluxkiln.compile.toolchains.tpu_mlir.bmodel import CANONICAL_TIME, Span, hash_span, read_bmodel
from fluxkiln.compile.toolchains.tpu_mlir.cast import cast_region, cast_weight_file, compare_stored
from fluxkiln.compile.toolchains.tpu_mlir.coefficients import CoefficientMap, Placement, Probe, learn_map
from fluxkiln.compile.toolchains.tpu_mlir.compiler import combine
from fluxkiln.compile.toolchains.tpu_mlir.executors import Simulator
from fluxkiln.compile.toolchains.tpu_mlir.forms import Form, form_bytes
from fluxkiln.compile.toolchains.tpu_mlir.moulds import make_mould
from fluxkiln.compile.toolchains.tpu_mlir.shell import lay_out, make_shell, write_check_code
from fluxkiln.errors import CompileError, IntegrityError
from fluxkiln.export.bindings import bind_part, weight_reader
from fluxkiln.export.synth import synthesize
from fluxkiln.types import find_part
from tests.compile.bmodels import check_codes

pytestmark = pytest.mark.tpu_mlir

NEIGHBOURS = {"t5_block.01": "t5_block.00", "double.01": "double.00", "single.02": "single.00"}
CASES = [
    (name, scheme)
    for scheme, names in {
        "W4BF16-rtn,tail=W4BF16-rtn": ("t5_block.01", "double.01", "single.02", "tail"),
        "BF16": ("t5_block.01", "double.01", "single.02", "tail"),
        "W8BF16": ("double.01", "single.02"),
    }.items()
    for name in names
]


@pytest.mark.slow
@pytest.mark.parametrize(("chip", "channels"), [("bm1688", 16), ("bm1684x2", 16), ("cv184x", 8)])
def test_convolutions_of_other_chips_are_cast(small_build, cast_and_direct, chip, channels):
    """Their input channels are in groups of other widths; the first convolution has 16."""
    build = small_build(scheme="BF16", target=chip)
    mould, cast, direct = cast_and_direct(build, "vae_decoder")
    compiled = build.cache.path(direct.blobs["bmodel"])
    code = hash_span(compiled, read_bmodel(compiled).nets[0].coefficients)
    assert cast.digest == f"sha256:{code.hex()}"
    assert f"f16_grouped{channels}" in build.cache.path(mould.result.outputs["map"]).read_text()


def test_a_third_chip_is_one_file_of_data(small_build, cast_and_direct):
    """Blocks in bfloat16: what is cast has the bytes that the compiler makes for that chip."""
    build = small_build(scheme="BF16", target="cv184x")
    _, cast, direct = cast_and_direct(build, "single.00")
    compiled = build.cache.path(direct.blobs["bmodel"])
    model = read_bmodel(compiled)
    assert (model.chip, cast.digest) == ("cv184x", f"sha256:{hash_span(compiled, model.nets[0].coefficients).hex()}")


def test_what_its_compiler_cannot_do_is_said(small_build):
    """Its sines are bfloat16, and those of the timestep may not be."""
    build = small_build(scheme="BF16", target="cv184x")
    with pytest.raises(CompileError, match=r"head_00 deploy: the compiler failed .*sin"):
        make_mould(*build, make_template(*build, "head", "onnx17"))


def test_another_chip_is_cast_with_lanes_of_its_own(small_build, cast_and_direct, tmp_path):
    build = small_build(scheme="W4BF16-rtn", target="bm1688")
    mould, cast, direct = cast_and_direct(build, "single.00")
    compiled = build.cache.path(direct.blobs["bmodel"])
    model = read_bmodel(compiled)
    code = hash_span(compiled, model.nets[0].coefficients)
    assert (model.chip, cast.digest) == ("bm1688", f"sha256:{code.hex()}")
    found = build.cache.path(mould.result.outputs["map"]).read_text()
    assert "scale_lanes32" in found
    assert "zero_lanes32" in found
    # dealt out to the other chip's lanes
    shutil.copy(compiled, tmp_path / "other.bmodel")
    wrong = CoefficientMap.from_json(json.loads(found.replace("_lanes32", "_lanes")))
    region = model.nets[0].coefficients
    assert (
        cast_region(tmp_path / "other.bmodel", region, coefficients_of(build, mould), reader_of(build, "single.00"))
        == code
    )
    assert cast_region(tmp_path / "other.bmodel", region, wrong, reader_of(build, "single.00")) != code


def reader_of(small_build, name):
    part = find_part(small_build.parts, name)
    template = make_template(*small_build, part.kind, "onnx17")
    return weight_reader(bind_part(part, template.slots, small_build.checkpoint), small_build.checkpoint)


def weights_of(small_build, part, net):
    return small_build.cache.path(part.blobs["bmodel"]).read_bytes()[net.coefficients.start : net.coefficients.stop]


def coefficients_of(small_build, mould):
    return CoefficientMap.from_json(json.loads(small_build.cache.path(mould.result.outputs["map"]).read_text()))


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_cast_equals_direct_compile(small_build, cast_and_direct, tmp_path, name, scheme):
    build = small_build(scheme=scheme)
    mould, cast, direct = cast_and_direct(build, name)
    assert mould.castable, mould.why
    (ours,), (theirs,) = (read_bmodel(build.cache.path(part.blobs["bmodel"])).nets for part in (cast, direct))
    stored = weights_of(build, cast, ours)
    assert stored == weights_of(build, direct, theirs)
    assert "sha256:" + hashlib.sha256(stored).hexdigest() == cast.digest
    assert ours.name == theirs.name
    # all else: the mould's shell under the part's name, and that of the direct compile
    make_shell(build.cache.path(cast.blobs["shell"]), cast.net, tmp_path / "renamed")
    make_shell(build.cache.path(direct.blobs["bmodel"]), cast.net, tmp_path / "direct")
    assert (tmp_path / "renamed").read_bytes() == (tmp_path / "direct").read_bytes()
    assert CANONICAL_TIME in build.cache.path(direct.blobs["bmodel"]).read_bytes()
    assert (direct.facts["quantized_matmuls"] > 0) == bool(build.plan.scheme(cast.part).weight_bits)
    # what the interpreter reads as well
    cast_weight_file(coefficients_of(build, mould), reader_of(build, name), tmp_path / "w.npz")
    with np.load(tmp_path / "w.npz") as made, np.load(build.cache.path(direct.blobs["weights"])) as compiled:
        assert set(made.files) == set(compiled.files)
        for array in compiled.files:
            assert made[array].dtype == compiled[array].dtype
            assert made[array].tobytes() == compiled[array].tobytes(), array
    # the control: with another block's weights, nothing of this holds
    if name in NEIGHBOURS:
        target = tmp_path / "other.bmodel"
        region = lay_out(tmp_path / "renamed", {cast.net: len(stored)}, target)[cast.net]
        cast_region(target, region, coefficients_of(build, mould), reader_of(build, NEIGHBOURS[name]))
        other = target.read_bytes()[region.start : region.stop]
        one, two = (np.frombuffer(data, np.uint8) for data in (stored, other))
        assert np.count_nonzero(one != two) > len(stored) // 3


def test_parts_cast_into_one_file_equal_their_single_files(small_build, cast_and_direct, tpu_mlir, tmp_path):
    """Two threads, two regions of one file; every net has the bytes that the compiler gives it."""
    build = small_build()
    direct, maps, shells = {}, {}, []
    for name in ("double.01", "single.02"):
        mould, _, part = cast_and_direct(build, name)
        direct[part.net], maps[part.net] = part, coefficients_of(build, mould)
        shells.append(tmp_path / f"{part.net}.shell")
        make_shell(build.cache.path(mould.result.outputs["shell"]), part.net, shells[-1])
    (tmp_path / "combine").mkdir()
    combine(tpu_mlir, "bm1684x", shells, tmp_path / "combine" / "shells", tmp_path / "log")
    target, sizes = tmp_path / "out.bmodel", {net: part.facts["weight_bytes"] for net, part in direct.items()}
    regions = lay_out(tmp_path / "combine" / "shells", sizes, target)

    def cast(net):
        return cast_region(target, regions[net], maps[net], reader_of(build, direct[net].part.name))

    with ThreadPoolExecutor(2) as pool:
        for net, code in zip(direct, pool.map(cast, direct), strict=True):
            assert code == hash_span(target, regions[net])
            write_check_code(target, net, code)
    check_codes(target)
    whole = target.read_bytes()
    for net, part in direct.items():
        (single,) = read_bmodel(build.cache.path(part.blobs["bmodel"])).nets
        stored = build.cache.path(part.blobs["bmodel"]).read_bytes()[
            single.coefficients.start : single.coefficients.stop
        ]
        assert whole[regions[net].start : regions[net].stop] == stored
        shares = compare_stored(target, net, maps[net], reader_of(build, part.part.name))
        assert not any(share.any() for share in shares.values())
    # a weight of another block, and one flipped bit, are seen
    shares = compare_stored(target, net, maps[net], reader_of(build, "single.00"))
    assert all(share.max() > 0.2 for slot, share in shares.items() if slot.endswith("__t"))
    region, flipped = regions[net], regions[net].start + 12345
    with target.open("r+b") as file:
        file.seek(flipped)
        file.write(bytes([whole[flipped] ^ 1]))
    shares = compare_stored(target, net, maps[net], reader_of(build, direct[net].part.name))
    assert sum(int(np.count_nonzero(share)) for share in shares.values()) == 1
    with pytest.raises(IntegrityError, match=f"the weights of net {net} do not have their check code"):
        check_codes(target)
    # casting over it puts everything right, padding too
    with target.open("r+b") as file:
        file.seek(region.start)
        file.write(b"?" * region.size)
    cast(net)
    assert target.read_bytes() == whole
    with pytest.raises(CompileError, match=r"the region has 4096 bytes, the mould's coefficients \d+"):
        cast_region(target, Span(region.start, 4096), maps[net], reader_of(build, direct[net].part.name))
    with pytest.raises(CompileError, match=rf"has {region.size} bytes of weights for net {net}, its mould has 1"):
        compare_stored(target, net, replace(maps[net], size=1), reader_of(build, direct[net].part.name))


# All kinds whose mould holds more than linear layers, and what else of the schemes differs in form.
CASTABLE = [
    *(("clip", "F16"), ("head", "BF16"), ("t5_embed", "F16"), ("t5_final", "BF16"), ("single", "F16"), ("tail", "F32")),
    ("tiny_vae_decoder", "F16"),
]
OTHERS = [
    *(("clip", scheme) for scheme in ("W4BF16", "W8BF16", "BF16", "F32")),
    *(("head", scheme) for scheme in ("W4BF16", "W8BF16", "F16", "F32")),
    *(("t5_embed", scheme) for scheme in ("BF16", "F32")),
    *(("t5_final", "F32"), ("single", "F32"), ("tail", "F16")),
    *((kind, scheme) for kind in ("tiny_vae_decoder", "vae_decoder") for scheme in ("BF16", "F32")),
    ("vae_decoder", "F16"),  # a build proves it
]
CASTABLE += [pytest.param(*case, marks=pytest.mark.thorough) for case in OTHERS]


@pytest.mark.parametrize(("kind", "scheme"), CASTABLE)
def test_every_kind_is_castable(compile_kind, tiny_template, tmp_path, kind, scheme):
    """From the shell and the map alone: the bytes that the compiler gives the checkpoint's weights."""
    mould, probe_weights = compile_kind(kind, scheme, 0)
    direct, weights = compile_kind(kind, scheme)
    slots = [spec.name for spec in tiny_template(kind, "onnx17").slots]
    bits = {"W4BF16": 4, "W8BF16": 8}.get(scheme, 0)

    def again():
        other, read = compile_kind(kind, scheme, 1)
        return Probe(other.bmodel, np.load(other.weights), read)

    with np.load(mould.weights) as arrays:
        found = learn_map(mould.bmodel, arrays, slots, probe_weights, 64 if bits else 0, bits, again)
    found = CoefficientMap.from_json(json.loads(json.dumps(found.to_json())))
    assert bool(found.constants) == (kind not in ("t5_embed", "t5_final", "tail", "single"))
    target = tmp_path / "out.bmodel"
    make_shell(mould.bmodel, f"{kind}_77", tmp_path / "shell")
    (region,) = lay_out(tmp_path / "shell", {f"{kind}_77": found.size}, target).values()
    write_check_code(target, f"{kind}_77", cast_region(target, region, found, weights))
    check_codes(target)
    (net,) = read_bmodel(direct.bmodel).nets
    stored = direct.bmodel.read_bytes()[net.coefficients.start : net.coefficients.stop]
    assert target.read_bytes()[region.start : region.stop] == stored
    assert not any(share.any() for share in compare_stored(direct.bmodel, net.name, found, weights).values())
    cast_weight_file(found, weights, tmp_path / "w.npz")
    with np.load(tmp_path / "w.npz") as made, np.load(direct.weights) as compiled:
        assert made.files == compiled.files
        for array in compiled.files:
            assert (made[array].dtype, made[array].shape) == (compiled[array].dtype, compiled[array].shape)
            assert made[array].tobytes() == compiled[array].tobytes(), array
    # a reader of whole weights gives the same as one of rows; the probe's weights give other bytes
    assert cast_region(target, region, found, lambda slot: weights(slot)) == hashlib.sha256(stored).digest()
    assert cast_region(target, region, found, probe_weights) != hashlib.sha256(stored).digest()


def test_weights_of_another_shape_are_refused(compile_kind, tiny_template, tmp_path):
    mould, weights = compile_kind("tail", "F32", 0)
    slots = [spec.name for spec in tiny_template("tail", "onnx17").slots]
    with np.load(mould.weights) as arrays:
        found = learn_map(mould.bmodel, arrays, slots, weights, 0, 0)
    target = tmp_path / "out"
    target.write_bytes(b"")

    class Short:
        def __call__(self, slot):
            return weights(slot)[:-1]

    class ShortRows(Short):
        def read_rows(self, slot, start, stop):
            return self(slot)[start:stop]

    for reader in (Short(), ShortRows()):
        with pytest.raises(CompileError, match=r"gets a weight of shape .*, its mould was compiled with \["):
            cast_region(target, Span(0, found.size), found, reader)


@pytest.mark.parametrize(
    ("names", "allowance"),
    [(("codes", "scale_lanes", "zero_lanes"), 6 << 20), (("bf16",), 6 << 20), (("f16_t",), (32 << 20) + (8 << 20))],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_no_whole_weight_is_in_memory(tmp_path, names, allowance):
    """But of what is stored transposed, in the format it is stored in. In float32 this one has 64 MB."""
    shape, block = (8192, 2048), np.random.default_rng(0).standard_normal((1024, 2048), np.float32)

    class Rows:
        def read_rows(self, slot, start, stop):
            return block[: stop - start]

    placements, size = [], 0
    for name in names:
        placements.append(Placement(Form("w", name), size))
        size += form_bytes(placements[-1].form, shape, 64, 4)
    target = tmp_path / "out"
    target.touch()
    found = CoefficientMap(tuple(placements), (), 64, 4, size, {"w": shape})
    cast_region(target, Span(0, size), found, Rows())  # compiles the kernels
    tracemalloc.start()
    try:
        cast_region(target, Span(0, size), found, Rows())
        assert tracemalloc.get_traced_memory()[1] < allowance
    finally:
        tracemalloc.stop()


def test_nets_of_a_combined_file_compute_what_their_single_files_do(small_build, cast_and_direct, tpu_mlir, tmp_path):
    """On the simulator, bit for bit; every net of the file, in another order than they lie in it."""
    build = small_build()
    singles, maps, shells = {}, {}, []
    for name in ("t5_block.01", "double.01", "single.02", "single.00", "tail"):
        mould, _, part = cast_and_direct(build, name)
        singles[part.net], maps[part.net] = part, coefficients_of(build, mould)
        shells.append(tmp_path / f"{part.net}.shell")
        make_shell(build.cache.path(mould.result.outputs["shell"]), part.net, shells[-1])
    (tmp_path / "combine").mkdir()
    combine(tpu_mlir, "bm1684x", shells, tmp_path / "combine" / "shells", tmp_path / "log")
    target, sizes = tmp_path / "out.bmodel", {net: found.size for net, found in maps.items()}
    for net, region in lay_out(tmp_path / "combine" / "shells", sizes, target).items():
        code = cast_region(target, region, maps[net], reader_of(build, singles[net].part.name))
        write_check_code(target, net, code)
    rng = np.random.default_rng(0)
    with Simulator(tpu_mlir, "bm1684x", tmp_path / "simulator.log") as simulator:
        results = {}
        for net, part in singles.items():
            (tmp_path / f"{net}.bmodel").symlink_to(build.cache.path(part.blobs["bmodel"]))
            inputs = {name: rng.standard_normal(shape).astype(np.float32) for name, _, shape in part.facts["inputs"]}
            outputs = tuple(name for name, *_ in part.facts["outputs"])
            results[net] = inputs, outputs, simulator.run(tmp_path / f"{net}.bmodel", inputs, outputs)
        for net, (inputs, outputs, expected) in reversed(results.items()):
            made = simulator.run(target, inputs, outputs, net)
            for output in outputs:
                assert np.isfinite(made[output]).all()
                assert made[output].any()
                assert made[output].tobytes() == expected[output].tobytes(), (net, output)
        # the control: another block of the kind computes something else from the same inputs
        inputs, outputs, expected = results["single_02"]
        made = simulator.run(target, inputs, outputs, "single_00")
        assert any(made[output].tobytes() != expected[output].tobytes() for output in outputs)


def test_second_checkpoint_needs_no_compiler(small_build, cast_and_direct, cast_alone, monkeypatch, tmp_path):
    first = small_build()
    for name in ("double.00", "double.01", "single.00", "single.01", "single.02"):
        cast_alone(first, name)

    def refuse(argv, *_):
        raise AssertionError(f"a tool was started: {argv}")

    monkeypatch.setattr(adapter, "run_tool", refuse)
    second = small_build(synthesize("tiny-schnell", tmp_path / "tiny-schnell", seed=1))
    assert second.checkpoint.variant == "schnell"
    for part in second.parts:
        if part.kind in ("double", "single"):
            template = make_template(*second, part.kind, "onnx17")
            mould = make_mould(*second, template)
            assert mould.result.hit
            made = cast_alone(second, part.name)
            check_codes(second.cache.path(made.blobs["bmodel"]))
            dev = cast_alone(first, part.name)
            assert dev.size == made.size
            assert dev.digest != made.digest


def test_the_net_is_renamed_and_the_mould_stays(small_build, cast_and_direct):
    build = small_build()
    mould, cast, _ = cast_and_direct(build, "single.02")
    assert [net.name for net in read_bmodel(build.cache.path(cast.blobs["bmodel"])).nets] == ["single_02"]
    shell = mould.result.outputs["shell"]
    assert [net.name for net in read_bmodel(build.cache.path(shell)).nets] == ["single_00"]
    assert build.cache.store.read(shell.digest)  # read checks the digest
