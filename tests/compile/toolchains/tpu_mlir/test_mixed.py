"""Blocks of one kind in two schemes, in one bundle: compiled, proven, cast, and computing what each scheme says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fluxkiln.build.calibration import DEFAULT_PROMPTS, calibrate
from fluxkiln.build.make import prepare
from fluxkiln.compile.toolchains.tpu_mlir.toolchain import TOOLCHAIN
from fluxkiln.progress import Laps, Silent
from fluxkiln.settings import Settings, read_prompts
from fluxkiln.types import Shapes
from fluxkiln.verify.gates import first_bad_rung
from fluxkiln.verify.metrics import compare
from tests.builds import Build, chip_ladder, opened_rungs

SCHEMES = {"double.00": "W4BF16", "double.01": "W8A8", "single.00": "W8A8", "single.01": "BF16", "single.02": "W8A8"}


@pytest.mark.tpu_mlir
@pytest.mark.thorough
def test_a_bundle_has_blocks_of_a_kind_in_two_schemes(tiny_checkpoint, record_parts, tmp_path):
    settings = Settings(
        "bm1684x", str(tiny_checkpoint().root), scheme="W8A8,double.00=W4BF16,single.01=BF16",
        components=("transformer",), build_dir=tmp_path / "build",
    )  # fmt: skip
    calibrate(replace(settings, scheme=None), read_prompts(DEFAULT_PROMPTS)[:4])
    prepared = prepare(settings)
    checkpoint, plan, cache = prepared.checkpoint, prepared.plan, prepared.cache
    made = TOOLCHAIN.make(checkpoint, plan, cache, settings, Silent(), Laps())
    blocks = {binary.part.name: binary for binary in made.binaries if binary.part.name in SCHEMES}
    assert {name: binary.scheme.name for name, binary in blocks.items()} == SCHEMES
    assert all(binary.made.startswith("cast") for binary in made.binaries)
    maps = {name: binary.blobs["map"].digest for name, binary in blocks.items()}
    assert maps["single.00"] == maps["single.02"]
    assert len(set(maps.values())) == 4
    # one part of each kind and scheme was compiled as well
    assert sum(", compiled: identical" in blocks[name].made for name in ("double.00", "double.01")) == 2
    ladder = chip_ladder()
    TOOLCHAIN.read_back(ladder, checkpoint, plan, cache, made)
    assert first_bad_rung(ladder.rows) == {}
    recording = record_parts("tiny-dev", plan.parts, Shapes(32, 32, 16))
    with opened_rungs(Build(checkpoint, plan, cache), made.binaries, made.files, tmp_path) as rungs:
        for name in ("double.00", "double.01", "single.01"):
            inputs = recording.inputs(name, 0)
            out = {rung: runner(name, inputs)["hidden_states_out"] for rung, runner in rungs.items()}
            for rung in ("interpreter", "simulator"):
                assert compare(out[rung], out["dequantized"], inputs["hidden_states"]).delta_cosine >= 0.999
