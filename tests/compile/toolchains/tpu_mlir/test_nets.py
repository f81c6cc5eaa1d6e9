"""What a manifest says of a net is compared with it: weights, their check code, inputs and outputs, the chip."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from fluxkiln.artifacts.manifest import PartEntry
from fluxkiln.compile.targets import find_target
from fluxkiln.compile.toolchains.tpu_mlir.bmodel import read_bmodel
from fluxkiln.compile.toolchains.tpu_mlir.nets import check_nets
from fluxkiln.errors import IntegrityError
from fluxkiln.patches.flux1.model import MODEL
from fluxkiln.types import Part, TensorSpec
from tests.hostile.readers import samples

FILE = "transformer.bmodel"


@pytest.fixture
def bundle(tmp_path) -> Any:
    """Of one part, whose net has weights and their check code."""
    path = tmp_path / FILE
    path.write_bytes(samples("bmodel")[0])
    (net,) = read_bmodel(path).nets
    weights = bytes(range(256)) * (net.coefficients.size // 256)
    code = hashlib.sha256(weights)
    with path.open("r+b") as file:
        for span, data in ((net.coefficients, weights), (net.check_code, code.digest())):
            file.seek(span.start)
            file.write(data)
    sides = ([TensorSpec(one.name, one.shape, one.dtype) for one in side] for side in (net.inputs, net.outputs))
    digest = f"sha256:{code.hexdigest()}"
    entry = PartEntry("single.00", "single", "W4BF16", FILE, net.name, digest, len(weights), *map(tuple, sides))
    manifest = SimpleNamespace(parts=(entry,))
    parts = (Part("single.00", MODEL.kinds["single"]),)
    return SimpleNamespace(folder=tmp_path, manifest=manifest, parts=parts, target=find_target("bm1684x"))


def test_what_is_true_is_taken(bundle):
    check_nets(bundle, {FILE})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"digest": "sha256:" + "0" * 64}, "has weights with the digest sha256:.*, the manifest says sha256:0000"),
        ({"size": 1}, "has weights of 4096 in .*, the manifest says 1"),
        ({"inputs": ()}, "has the inputs"),
        ({"outputs": (TensorSpec("x", (1,), "float32"),)}, "has the outputs"),
        ({"net": "single_01"}, "is said to be the net 'single_01', it is called single_00"),
    ],
)
def test_what_a_manifest_says_of_a_net(bundle, changes, words):
    bundle.manifest.parts = (replace(bundle.manifest.parts[0], **changes),)
    with pytest.raises(IntegrityError, match=f"part single.00 {words}"):
        check_nets(bundle, {FILE})


def test_weights_and_the_code_by_which_a_runtime_shares_them(bundle):
    (net,) = read_bmodel(bundle.folder / FILE).nets
    data = bytearray((bundle.folder / FILE).read_bytes())
    data[net.coefficients.start] ^= 1
    (bundle.folder / FILE).write_bytes(data)
    check_nets(bundle, set())  # bytes that were found right before are not read again
    with pytest.raises(IntegrityError, match="weights with the digest"):
        check_nets(bundle, {FILE})
    # the manifest tells the truth, the file's own code does not
    digest = hashlib.sha256(data[net.coefficients.start : net.coefficients.stop]).hexdigest()
    bundle.manifest.parts = (replace(bundle.manifest.parts[0], digest=f"sha256:{digest}"),)
    with pytest.raises(IntegrityError, match="has the check code"):
        check_nets(bundle, {FILE})


def test_nets_of_another_chip_or_of_other_parts(bundle):
    bundle.target = find_target("bm1688")
    with pytest.raises(IntegrityError, match="which is for bm1684x"):
        check_nets(bundle, {FILE})
    bundle.target = find_target("bm1684x")
    more = replace(bundle.manifest.parts[0], name="single.01", net="single_01")
    bundle.manifest.parts += (more,)
    bundle.parts += (Part("single.01", MODEL.kinds["single"]),)
    with pytest.raises(IntegrityError, match="the net single_01 of it is missing or odd"):
        check_nets(bundle, {FILE})
