"""The shipped table of nets: what it holds is found for the builds it was measured for, and for no other."""

from __future__ import annotations

import pytest

from fluxkiln.build.make import outline
from fluxkiln.compile.toolchains.tpu_mlir import measured
from fluxkiln.compile.toolchains.tpu_mlir.devices import plan_files
from fluxkiln.compile.toolchains.tpu_mlir.jobs import planned_binaries
from fluxkiln.settings import Settings

NET = {
    "weight_bytes": 4 << 20,
    "instruction_bytes": 1 << 20,
    "runtime_bytes": 2 << 20,
    "estimate_ms": 7.0,
    "seconds": 3,
}


@pytest.fixture
def outlined(tmp_path):
    def make(**changes):
        return outline(Settings("bm1684x", "full-dev", build_dir=tmp_path / "build", **changes))

    return make


@pytest.fixture
def table(monkeypatch):
    nets = {}
    monkeypatch.setattr(measured, "_nets", lambda: nets)
    return nets


def files(prepared):
    binaries = planned_binaries(prepared.checkpoint, prepared.plan, prepared.cache)
    return plan_files(prepared.checkpoint, prepared.plan, binaries)


def test_what_is_not_measured_is_not_a_zero(outlined, table):
    found = files(outlined())
    assert found["origin"] == "weights"
    assert {(file["instructions"], file["runtime"]) for file in found["files"]} == {(None, None)}
    assert found["estimate"] == {"steps": 28, "step_ms": None, "once_ms": None, "image_ms": None}


def test_a_measured_build_is_known(outlined, table):
    prepared = outlined()
    for kind in prepared.plan.kinds():
        table[measured.net_key(prepared.checkpoint, prepared.plan, kind)] = NET
    found = files(prepared)
    assert found["origin"] == "measured"
    step = [part for part in prepared.plan.parts if part.traits.each_step]
    assert found["estimate"]["step_ms"] == 7.0 * len(step)
    assert all(file["runtime"] == 2 << 20 for file in found["files"])
    table.pop(measured.net_key(prepared.checkpoint, prepared.plan, "vae_decoder"))
    part = files(prepared)
    assert part["origin"] == "weights"
    assert (part["estimate"]["image_ms"], part["estimate"]["step_ms"]) == (None, 7.0 * len(step))
    assert [file["runtime"] is None for file in part["files"]] == [False] * 4 + [True]


@pytest.mark.parametrize("changes", [{"size": ((512, 512),)}, {"scheme": "W8BF16"}, {"tokens": (256,)}])
def test_another_build_has_other_blocks(outlined, changes):
    plain, other = outlined(), outlined(**changes)
    keys = {measured.net_key(one.checkpoint, one.plan, "double_modulated") for one in (plain, other)}
    assert len(keys) == 2
    same = {measured.net_key(one.checkpoint, one.plan, "clip") for one in (plain, other)}
    assert len(same) == 1


def test_methods_of_rounding_share_a_net(outlined):
    keys = {
        measured.net_key(one.checkpoint, one.plan, "double_modulated")
        for one in (outlined(), outlined(scheme="W4BF16-rtn"))
    }
    assert len(keys) == 1


def test_the_table_is_whole():
    for key, net in measured._nets().items():
        assert len(key) == len(measured.KEY)
        assert all(net[name] > 0 for name in ("weight_bytes", "instruction_bytes", "runtime_bytes")), key
