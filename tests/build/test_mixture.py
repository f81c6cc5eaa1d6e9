"""Mixtures of two schemes for devices of so much memory: full size, by shapes alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fluxkiln.build import mixture
from fluxkiln.build.block_errors import known_errors, measure_errors
from fluxkiln.build.calibration import DEFAULT_PROMPTS, calibrate
from fluxkiln.build.make import outline, prepare
from fluxkiln.build.mixture import find_mixtures, measure_blocks, mix_blocks
from fluxkiln.compile.toolchain import toolchain_of
from fluxkiln.errors import ResourceError, SchemeError
from fluxkiln.progress import Silent
from fluxkiln.quantize.schemes import parse_scheme
from fluxkiln.settings import Settings, read_prompts


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return outline(Settings("bm1684x", "full-dev", build_dir=tmp_path_factory.mktemp("build")))


def while_denoising(prepared, scheme: str) -> int:
    other = outline(replace(prepared.settings, scheme=scheme))
    return max(
        toolchain_of(other.plan.target).devices(other.checkpoint, other.plan, other.cache)["peaks"]["while denoising"]
    )


def test_as_many_blocks_as_fit_are_in_the_fast_scheme(prepared):
    made = mix_blocks(prepared, 7_600_000_000)
    assert while_denoising(prepared, made.scheme) == made.bytes <= made.budget
    assert set(made.blocks) == {"W4BF16", "W8A8"}
    last = made.blocks["W8A8"] - 38 - 1
    assert made.scheme == f"W4BF16,double.00-{last:02d}=W8A8,single.00-37=W8A8"
    assert while_denoising(prepared, f"W4BF16,double.00-{last + 1:02d}=W8A8,single.00-37=W8A8") > made.budget


def test_a_large_budget_has_all_blocks_and_a_small_one_none(prepared):
    assert mix_blocks(prepared, 16_000_000_000).scheme == "W4BF16,double.00-18=W8A8,single.00-37=W8A8"
    least = while_denoising(prepared, "W4BF16")
    assert mix_blocks(prepared, least).scheme == "W4BF16"
    with pytest.raises(ResourceError, match=r"with all blocks in W4BF16, more than the .* GB of --budget"):
        mix_blocks(prepared, least - 1)


def test_the_usual_devices_are_told_without_being_asked_for(prepared):
    found = find_mixtures(prepared, ())
    assert [one.budget for one in found] == [7615 << 20, 12_000_000_000, 16_000_000_000]
    assert [one.blocks["W8A8"] for one in found[1:]] == [57, 57]
    large = find_mixtures(outline(replace(prepared.settings, scheme="BF16")), ())
    assert [one.budget for one in large] == [12_000_000_000, 16_000_000_000]


@pytest.fixture
def errors(monkeypatch):
    """What blocks lose: shipped figures, with some of them replaced."""

    def lose(changed):
        def known(prepared, schemes):
            found, _ = known_errors(prepared, schemes)
            return {(part, one): changed.get((part, one.name), error) for (part, one), error in found.items()}, "here"

        monkeypatch.setattr(mixture, "known_errors", known)

    return lose


def test_of_blocks_that_save_the_same_time_those_that_gain_most_come_first(prepared, errors):
    errors({("double.17", "W4BF16"): 0.3, ("double.03", "W4BF16"): 0.2})
    made = mix_blocks(prepared, 6_700_000_000)
    singles = made.blocks["W8A8"]
    assert 0 < singles < 38
    errors({(f"single.{number:02d}", "W4BF16"): 0.2 + number / 100 for number in range(38)})
    assert mix_blocks(prepared, 6_700_000_000).scheme == f"W4BF16,single.{38 - singles:02d}-37=W8A8"
    errors({("single.05", "W4BF16"): 0.3, ("single.36", "W4BF16"): 0.2})
    assert mix_blocks(prepared, 6_700_000_000).scheme == f"W4BF16,single.00-{singles - 2:02d}=W8A8,single.36=W8A8"


def test_a_block_that_loses_more_in_it_does_not_get_the_fast_scheme(prepared, errors):
    errors({("double.07", "W8A8"): 0.2, ("single.00", "W8A8"): 0.2})
    made = mix_blocks(prepared, 16_000_000_000)
    assert made.scheme.startswith("W4BF16,double.00-06=W8A8,double.07=")
    assert made.scheme.endswith(",single.01-37=W8A8")
    assert (made.blocks["W8A8"], made.errors) == (55, "here")


def test_without_estimates_of_time_the_nearest_mixture_is_chosen(prepared):
    at_another_size = outline(replace(prepared.settings, size=((640, 640),)))
    made = mix_blocks(at_another_size, 40_000_000_000)
    assert (made.step_ms, made.blocks) == (None, {"W8BF16": 57})


def test_what_blocks_lose_is_measured_and_kept(tiny_checkpoint, tmp_path):
    """A scheme that no block can have loses without end, and nothing is measured twice."""
    settings = Settings(
        "bm1684x", str(tiny_checkpoint().root), components=("transformer",), build_dir=tmp_path, size=((32, 32),),
        tokens=(16,),
    )  # fmt: skip
    calibrate(replace(settings, seed=1000), read_prompts(DEFAULT_PROMPTS)[:2])
    prepared, schemes = prepare(settings), [parse_scheme(name) for name in ("W4BF16", "W8A8")]
    _, source = known_errors(prepared, schemes)
    assert source == "measured on wide-dev, flux; --measure finds this checkpoint's own"
    refused = parse_scheme("W8A8-qk1")
    measure_errors(prepared, [*schemes, refused], Silent())
    assert {error for (_, scheme), error in known_errors(prepared, [refused])[0].items()} == {np.inf}
    found, source = known_errors(prepared, schemes)
    assert source == "measured on this checkpoint"
    assert len(set(found.values())) == len(found) == 10
    four, eight = (np.mean([error for (_, scheme), error in found.items() if scheme == one]) for one in schemes)
    assert 0 < eight < four < 0.2
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("fluxkiln.build.block_errors.record", None)
        measure_errors(prepared, schemes, Silent())


def test_without_a_calibration_nothing_is_measured(tiny_checkpoint, tmp_path):
    prepared = prepare(
        Settings("bm1684x", str(tiny_checkpoint().root), components=("transformer",), build_dir=tmp_path)
    )
    with pytest.raises(SchemeError, match="W8A8, which needs calibration"):
        measure_blocks(prepared, Silent())


@pytest.mark.parametrize(
    ("target", "scheme"), [("trn1", None), ("bm1684x", "double=BF16"), ("bm1684x", "W4BF16,double.00=BF16")]
)
def test_what_cannot_be_mixed(tmp_path, target, scheme):
    prepared = outline(Settings(target, "tiny-dev", scheme=scheme, build_dir=tmp_path))
    with pytest.raises(SchemeError, match="a budget mixes schemes of blocks on one device"):
        mix_blocks(prepared, 1_000_000_000)
    assert find_mixtures(prepared, ()) == []


def test_a_plan_in_pieces_has_every_part_once(prepared):
    plan = outline(replace(prepared.settings, scheme="W4BF16,double.03-05=W8A8,double.07=BF16,single.01=W8A8")).plan
    pieces = plan.alike()
    assert sorted(part.name for piece in pieces for part in piece.parts) == sorted(part.name for part in plan.parts)
    for piece in pieces:
        assert piece.alike() == (piece,)
        assert all(piece.scheme(part) == plan.scheme(part) == plan.of(part).schemes[part.kind] for part in piece.parts)
    assert [len(piece.parts) for piece in pieces[1:]] == [4, 1]
    assert plan.scheme_names()["double.07"] == "BF16"
    assert plan.scheme(next(part for part in plan.parts if part.name == "double.04")) == parse_scheme("W8A8")
    assert prepared.plan.alike() == (prepared.plan,)
