"""bmodel files, as the real compiler writes them."""

from __future__ import annotations

import shutil
import struct

import pytest

from fluxkiln.artifacts.bundle import write_bundle
from fluxkiln.artifacts.intact import read_bundle
from fluxkiln.artifacts.store import open_store
from fluxkiln.compile.toolchains.tpu_mlir.bmodel import (
    CANONICAL_TIME,
    hash_span,
    normalise_time,
    read_bmodel,
)
from fluxkiln.errors import IntegrityError
from tests.compile.bmodels import check_codes

pytestmark = pytest.mark.tpu_mlir


@pytest.fixture
def bmodel(compile_matmul, tmp_path):
    """A copy that may be spoilt."""
    return shutil.copyfile(compile_matmul()[1].bmodel, tmp_path / "net.bmodel")


def flip(path, position):
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 0x40]))


def test_what_a_bmodel_declares(bmodel, compile_matmul):
    _, _, weight = compile_matmul()
    model = read_bmodel(bmodel)
    (net,) = model.nets
    data = bmodel.read_bytes()
    assert (model.chip, net.name) == ("bm1684x", "matmul")
    assert [(tensor.name, tensor.dtype, tensor.shape) for tensor in net.inputs] == [("x", "float32", (1, 8, 128))]
    assert [(tensor.dtype, tensor.shape) for tensor in net.outputs] == [("float32", (1, 8, 64))]
    assert data[net.name_span.start : net.name_span.stop] == b"matmul"
    assert data[net.coefficients.start : net.coefficients.stop] == weight.T.tobytes()
    assert [(entry.start, entry.size) for entry in net.entries] == [(0, weight.nbytes)]
    assert data[net.check_code.start : net.check_code.stop] == hash_span(bmodel, net.coefficients)
    assert net.instruction_bytes > 0
    assert net.runtime_bytes >= 4 * 8 * (128 + 64)


def test_the_build_time_is_the_canonical_one(bmodel):
    span = read_bmodel(bmodel).time_span
    whole = bmodel.read_bytes()
    assert whole[span.start : span.stop] == CANONICAL_TIME
    with bmodel.open("r+b") as file:
        file.seek(span.start)
        file.write(b"Fri Nov 20 07:46:43 2026\n")
    assert bmodel.read_bytes() != whole
    normalise_time(bmodel)
    assert bmodel.read_bytes() == whole


@pytest.mark.parametrize("place", [0, 12345, 32767])
def test_one_flipped_byte_of_the_weights_is_caught(bmodel, place):
    check_codes(bmodel)
    flip(bmodel, read_bmodel(bmodel).nets[0].coefficients.start + place)
    with pytest.raises(IntegrityError, match="the weights of net matmul do not have their check code") as raised:
        check_codes(bmodel)
    assert raised.value.exit_code == 4


def test_stale_check_code_is_caught(bmodel):
    flip(bmodel, read_bmodel(bmodel).nets[0].check_code.start + 7)
    with pytest.raises(IntegrityError, match="check code; cast it again"):
        check_codes(bmodel)


@pytest.mark.parametrize("where", ["weights", "instructions", "time"])
def test_a_flipped_byte_anywhere_is_caught_in_a_bundle(bmodel, tmp_path, where):
    manifest = {
        "name": "tiny-dev", "target": "bm1684x", "model": "flux1", "variant": "dev",
        "shapes": {"height": 32, "width": 32, "tokens": 16},
        "checkpoint": {"source": "tiny-dev", "fingerprint": "sha256:" + "ab" * 32},
        "licence": {"spdx": "Apache-2.0", "file": "LICENSE"},
        "settings": {"vae": "kl"}, "parity": {"verified": False}, "tools": {}, "parts": [],
    }  # fmt: skip
    store = open_store(tmp_path / "store")
    files = {"transformer.bmodel": bmodel, "LICENSE": store.add_bytes(b"text")}
    bundle = tmp_path / "bundle"
    write_bundle(bundle, files, manifest, store)
    read_bundle(bundle)
    model, home = read_bmodel(bmodel), bundle / "transformer.bmodel"
    place = {
        "weights": model.nets[0].coefficients.start,
        "instructions": model.nets[0].coefficients.stop + 16,
        "time": model.time_span.start,
    }[where]
    home.chmod(0o644)
    flip(home, place)
    with pytest.raises(IntegrityError, match=r"transformer\.bmodel") as raised:
        read_bundle(bundle)
    assert raised.value.exit_code == 4


def test_files_that_are_no_bmodels(bmodel, tmp_path):
    for content in (b"", b"not a bmodel", b"x" * 4096):
        (tmp_path / "no.bmodel").write_bytes(content)
        with pytest.raises(IntegrityError, match="is no bmodel"):
            read_bmodel(tmp_path / "no.bmodel")
    data = bmodel.read_bytes()
    (tmp_path / "short.bmodel").write_bytes(data[:-1])
    with pytest.raises(IntegrityError, match=rf"has {len(data) - 1} bytes, its header promises {len(data)}"):
        read_bmodel(tmp_path / "short.bmodel")


def test_damaged_table_of_contents_is_named(bmodel):
    with bmodel.open("r+b") as file:
        file.seek(64)
        file.write(struct.pack("<I", 0x7FFFFFF0))
    with pytest.raises(IntegrityError, match="damaged table of contents"):
        read_bmodel(bmodel)
