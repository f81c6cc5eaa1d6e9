"""Shells combined by the compiler's own tool, and coefficients laid out behind them."""

from __future__ import annotations

import hashlib
import re
import shutil

import pytest

from fluxkiln.compile.process import run_tool
from fluxkiln.compile.toolchains.tpu_mlir.bmodel import CANONICAL_TIME, HEADER, hash_span, read_bmodel
from fluxkiln.compile.toolchains.tpu_mlir.compiler import combine
from fluxkiln.compile.toolchains.tpu_mlir.environment import tool_argv, tpu_mlir_environ
from fluxkiln.compile.toolchains.tpu_mlir.shell import (
    PAGE,
    copy_region,
    lay_out,
    make_shell,
    placeholder,
    write_check_code,
)
from fluxkiln.errors import CompileError, IntegrityError
from tests.compile.bmodels import check_codes

pytestmark = pytest.mark.tpu_mlir


@pytest.fixture
def bmodel(compile_matmul):
    """A single-net bmodel of 32 KiB of weights."""
    return compile_matmul()[1].bmodel


@pytest.fixture
def combine_shells(tpu_mlir, tmp_path):
    """net -> bmodel; the combined file of their shells."""

    def make(bmodels):
        shells, folder = [], tmp_path / "combined"
        folder.mkdir()
        for index, (net, path) in enumerate(bmodels.items()):
            shells.append(tmp_path / f"shell{index}")
            make_shell(path, net, shells[-1])
        combine(tpu_mlir, "bm1684x", shells, folder / "shells", folder / "log")
        return folder / "shells"

    return make


def flip(path, position):
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))


def model_tool(env, folder, *arguments):
    log = folder / "model_tool.log"
    run_tool([*tool_argv(env, "model_tool"), *map(str, arguments)], folder, tpu_mlir_environ(env, "bm1684x"), log, "")
    return log.read_text()


def commands(path, net):
    """Everything of a net that is not its coefficients: names, tensors, instruction bytes."""
    model = read_bmodel(path)
    (found,) = (one for one in model.nets if one.name == net)
    return found.inputs, found.outputs, found.entries, found.instruction_bytes, found.runtime_bytes


def test_shell_is_the_bmodel_without_weights(bmodel, tmp_path):
    make_shell(bmodel, "matmul", tmp_path / "shell")
    (whole,), (shell,) = read_bmodel(bmodel).nets, read_bmodel(tmp_path / "shell").nets
    data = (tmp_path / "shell").read_bytes()
    page = data[shell.coefficients.start : shell.coefficients.stop]
    assert page == placeholder("matmul")
    assert len(page) == PAGE
    assert data[shell.check_code.start : shell.check_code.stop] == hashlib.sha256(page).digest()
    assert len(data) == bmodel.stat().st_size - whole.coefficients.size + PAGE
    assert commands(tmp_path / "shell", "matmul") == commands(bmodel, "matmul")
    assert CANONICAL_TIME in data
    check_codes(tmp_path / "shell")


@pytest.mark.parametrize("name", ["matmul", "maTmul", "a", "a_much_longer_name.than_the_one_it_had"])
def test_shell_has_any_name(bmodel, combine_shells, tmp_path, name):
    make_shell(bmodel, name, tmp_path / "shell")
    assert commands(tmp_path / "shell", name) == commands(bmodel, "matmul")
    # a shell of a shell is the same as of the bmodel, and one's own name comes back
    make_shell(tmp_path / "shell", "matmul", tmp_path / "again")
    make_shell(bmodel, "matmul", tmp_path / "first")
    assert commands(tmp_path / "again", "matmul") == commands(bmodel, "matmul")
    if len(name) == len("matmul"):
        assert (tmp_path / "again").read_bytes() == (tmp_path / "first").read_bytes()
    # the compiler's tool reads the name as well
    combined = combine_shells({name: bmodel, "other": bmodel})
    assert [net.name for net in read_bmodel(combined).nets] == [name, "other"]


def test_shells_with_one_placeholder_would_share_their_coefficients(bmodel, combine_shells, tmp_path, tpu_mlir):
    combined = combine_shells({"one": bmodel, "two": bmodel})
    one, two = read_bmodel(combined).nets
    assert one.coefficients != two.coefficients
    assert placeholder("one") != placeholder("two")
    # the control: with the same page they are one range, which no two nets can be cast into
    page = placeholder("one")
    shells = [tmp_path / "shell0", tmp_path / "shell1"]
    for shell in shells:
        (net,) = read_bmodel(shell).nets
        with shell.open("r+b") as file:
            file.seek(net.coefficients.start)
            file.write(page)
    (tmp_path / "again").mkdir()
    combine(tpu_mlir, "bm1684x", shells, tmp_path / "again" / "shells", tmp_path / "log")
    one, two = read_bmodel(tmp_path / "again" / "shells").nets
    assert one.coefficients == two.coefficients


def test_combined_file_has_a_page_aligned_region_for_each_net(bmodel, combine_shells, tmp_path):
    combined = combine_shells({"one": bmodel, "two": bmodel, "three": bmodel})
    sizes = dict.fromkeys(("three", "one", "two"), 32768)
    regions = lay_out(combined, sizes, tmp_path / "out.bmodel")
    assert list(regions) == ["one", "two", "three"]
    starts = [region.start for region in regions.values()]
    assert starts == sorted(set(starts))
    assert all(start % PAGE == 0 for start in starts)
    assert starts[0] >= combined.stat().st_size
    assert {net.name: net.coefficients for net in read_bmodel(tmp_path / "out.bmodel").nets} == regions
    assert (tmp_path / "out.bmodel").stat().st_size == starts[-1] + 32768
    assert not any((tmp_path / "out.bmodel").read_bytes()[starts[0] :])
    assert placeholder("one") not in (tmp_path / "out.bmodel").read_bytes()
    with pytest.raises(IntegrityError, match="the weights of net one do not have their check code"):
        check_codes(tmp_path / "out.bmodel")
    lay_out(combined, sizes, tmp_path / "again.bmodel")
    assert (tmp_path / "again.bmodel").read_bytes() == (tmp_path / "out.bmodel").read_bytes()


def test_copied_regions_are_what_the_tool_extracts(bmodel, compile_matmul, combine_shells, tmp_path, tpu_mlir):
    other = compile_matmul(192)[1].bmodel
    bmodels = {"first_00": bmodel, "second": other, "third": bmodel}
    target = tmp_path / "out.bmodel"
    sizes = {net: read_bmodel(path).nets[0].coefficients.size for net, path in bmodels.items()}
    regions = lay_out(combine_shells(bmodels), sizes, target)
    for net, path in bmodels.items():
        code = copy_region(path, target, regions[net])
        assert code == hash_span(target, regions[net])
        write_check_code(target, net, code)
    check_codes(target)
    information = model_tool(tpu_mlir, tmp_path, "--info", target)
    found = re.findall(r"^net \d+: \[(\w+)\]", information, re.MULTILINE)
    assert found == list(bmodels)
    (tmp_path / "extract").mkdir()
    model_tool(tpu_mlir, tmp_path / "extract", "--extract", target)
    extracted = {read_bmodel(path).nets[0].name: path for path in (tmp_path / "extract").glob("*.bmodel")}
    assert set(extracted) == set(bmodels)
    for net, path in bmodels.items():
        assert commands(extracted[net], net) == commands(path, read_bmodel(path).nets[0].name)
        assert coefficients(extracted[net]) == coefficients(path)


def coefficients(path):
    (net,) = read_bmodel(path).nets
    return path.read_bytes()[net.coefficients.start : net.coefficients.stop]


def test_what_does_not_fit_is_refused(bmodel, compile_matmul, combine_shells, tmp_path):
    combined, target = combine_shells({"one": bmodel, "two": bmodel}), tmp_path / "out.bmodel"
    with pytest.raises(CompileError, match="has the nets one, two, sizes are given for one, three"):
        lay_out(combined, {"one": 32768, "three": 32768}, target)
    with pytest.raises(CompileError, match="net two lists 32768 bytes of coefficients, its region would have 28672"):
        lay_out(combined, {"one": 32768, "two": 28672}, target)
    regions = lay_out(combined, {"one": 32768, "two": 32768}, target)
    with pytest.raises(CompileError, match=r"has 49152 bytes of coefficients, the region 32768"):
        copy_region(compile_matmul(192)[1].bmodel, target, regions["one"])
    with pytest.raises(CompileError, match="has no net 'three'; it has one, two"):
        write_check_code(target, "three", bytes(32))
    with pytest.raises(CompileError, match="the check code of net one has 32 bytes"):
        write_check_code(target, "one", bytes(31))
    with pytest.raises(CompileError, match="has 2 nets; a shell is made of one"):
        make_shell(combined, "one", target)
    spoilt = shutil.copyfile(bmodel, tmp_path / "spoilt")
    flip(spoilt, read_bmodel(spoilt).nets[0].coefficients.start + 77)
    with pytest.raises(IntegrityError, match="the weights of net matmul do not have their check code"):
        copy_region(spoilt, target, regions["one"])


def test_bytes_of_unknown_use_are_not_left_behind(bmodel, tmp_path):
    data = bytearray(bmodel.read_bytes())
    magic, header, flatbuffer, binary = HEADER.unpack_from(data)
    HEADER.pack_into(data, 0, magic, header, flatbuffer, binary + 2 * PAGE)
    (tmp_path / "more").write_bytes(bytes(data) + b"?" * 2 * PAGE)
    with pytest.raises(CompileError, match="of its binary area are of unknown use, so it has no shell"):
        make_shell(tmp_path / "more", "matmul", tmp_path / "shell")
