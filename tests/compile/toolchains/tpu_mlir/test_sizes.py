"""Several sizes in one bmodel: nets of one part share their coefficients, by the vendor's own tool and simulator."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest

from fluxkiln.artifacts.actions import ActionCache
from fluxkiln.build.make import build, outline
from fluxkiln.compile.opener import open_bundle
from fluxkiln.compile.process import run_tool
from fluxkiln.compile.toolchain import open_executor
from fluxkiln.compile.toolchains.tpu_mlir.bmodel import read_bmodel
from fluxkiln.compile.toolchains.tpu_mlir.environment import tool_argv, tpu_mlir_environ
from fluxkiln.compile.toolchains.tpu_mlir.shell import PAGE
from fluxkiln.errors import IntegrityError, ResourceError
from fluxkiln.files import digest_file
from fluxkiln.settings import Settings
from fluxkiln.types import Shapes
from tests.compile.bmodels import check_codes
from tests.hostile.forged import forge

pytestmark = [pytest.mark.tpu_mlir, pytest.mark.thorough]
OTHER = Shapes(height=32, width=48, tokens=16)
FILE = "transformer.bmodel"


@pytest.fixture(scope="module")
def settings(tiny_checkpoint, tmp_path_factory):
    return Settings(
        "bm1684x", str(tiny_checkpoint().root), components=("transformer",), modulation="inline", verify=False,
        build_dir=tmp_path_factory.mktemp("sizes") / "build",
    )  # fmt: skip


@pytest.fixture(scope="module")
def bundles(settings):
    """Of the first size, of the other, and then of both: a size added to a finished bundle."""
    one, other = build(settings), build(replace(settings, size=((48, 32),)))
    both = replace(settings, size=((32, 32), (48, 32)))
    return one, other, build(both)


def test_a_size_is_added_without_a_cast_or_a_compile(bundles):
    _, _, both = bundles
    assert both.compiler_runs == 1, "the shells are combined"
    assert both.cache["stages"]["cast"]["misses"] == 0, both.cache


def test_nets_of_a_part_share_their_weights(bundles, tmp_path, tpu_mlir):
    one, _, both = bundles
    file = both.bundle / FILE
    nets = {net.name: net for net in read_bmodel(file).nets}
    alone = read_bmodel(one.bundle / FILE)
    assert len(nets) == 2 * len(alone.nets)
    for net in alone.nets:
        assert nets[net.name].coefficients == nets[f"{net.name}_48x32_16"].coefficients
        assert nets[net.name].coefficients.size == net.coefficients.size
    assert len({net.coefficients for net in nets.values()}) == len(alone.nets)
    check_codes(file)
    shared = {file.sha256 for file in open_bundle(both.bundle).manifest.files}
    assert shared
    weights = sum(net.coefficients.size for net in alone.nets)
    more = file.stat().st_size - (one.bundle / FILE).stat().st_size
    assert more < weights
    # by the vendor's own tool: as many bytes of weights as one size has
    argv = [*tool_argv(tpu_mlir, "model_tool"), "--info", str(file)]
    log = tmp_path / "log"
    run_tool(argv, tmp_path, tpu_mlir_environ(tpu_mlir, "bm1684x"), log, "")
    assert "double_00_48x32_16" in log.read_text()


def test_the_simulator_runs_both_sizes_on_shared_weights(bundles):
    _, other, both = bundles
    random = np.random.default_rng(0)
    made = []
    for bundle in (open_bundle(both.bundle).at(OTHER), open_bundle(other.bundle)):
        executor, random = open_executor(bundle, "cmodel"), np.random.default_rng(0)
        try:
            for part in ("double.01", "single.02"):
                specs = bundle.nets[part].inputs
                inputs = {spec.name: random.standard_normal(spec.shape).astype(np.float32) for spec in specs}
                made.append(executor(part, inputs))
        finally:
            executor.close()
    for shared, alone in zip(made[:2], made[2:], strict=True):
        for name, array in alone.items():
            np.testing.assert_array_equal(shared[name], array)


def test_a_region_that_is_shifted_by_a_page_is_refused(bundles, tmp_path):
    shutil.copytree(bundles[2].bundle, tmp_path / "bundle")
    file = tmp_path / "bundle" / FILE
    net = next(net for net in read_bmodel(file).nets if net.name == "double_01_48x32_16")
    data = bytearray(file.read_bytes())
    start = int.from_bytes(data[net.coefficients_field : net.coefficients_field + 8], "little")
    data[net.coefficients_field : net.coefficients_field + 8] = (start - PAGE).to_bytes(8, "little")
    file.unlink()
    file.write_bytes(data)
    digest, size = digest_file(file)

    def change(document):
        entry = next(one for one in document["files"] if one["path"] == FILE)
        entry.update(sha256=digest.removeprefix("sha256:"), size=size)

    with pytest.raises(IntegrityError, match=r"part double.01@48x32-16 has weights with the digest"):
        open_bundle(forge(tmp_path / "bundle", change))


def test_sizes_that_do_not_fit_together_are_refused(settings, bundles):
    both = replace(settings, size=((32, 32), (48, 32)))
    prepared = outline(both)
    from fluxkiln.compile.toolchains.tpu_mlir.devices import group_parts, plan_devices
    from fluxkiln.compile.toolchains.tpu_mlir.jobs import planned_binaries

    assert isinstance(prepared.cache, ActionCache)
    alone, together = (
        plan_devices(plan, group_parts(plan, planned_binaries(prepared.checkpoint, plan, prepared.cache)))
        for plan in (prepared.plan.at(prepared.plan.shapes), prepared.plan)
    )
    (one,), (two,) = alone.files, together.files
    assert (two.weights, two.runtime >= one.runtime) == (one.weights, True)
    assert two.instructions > one.instructions
    small = replace(both, device_memory=(one.total + two.total) // 2, devices=1)
    with pytest.raises(ResourceError, match=r"fewer sizes, or a board with more"):
        build(small)
