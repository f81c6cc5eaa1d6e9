"""Mixtures of two schemes for devices of so much memory: full size, by shapes alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fluxkiln.build.make import outline
from fluxkiln.build.mixture import mix_blocks
from fluxkiln.compile.toolchain import toolchain_of
from fluxkiln.errors import ResourceError, SchemeError
from fluxkiln.quantize.schemes import parse_scheme
from fluxkiln.settings import Settings


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return outline(Settings("bm1684x", "full-dev", build_dir=tmp_path_factory.mktemp("build")))


def while_denoising(prepared, scheme: str) -> int:
    other = outline(replace(prepared.settings, scheme=scheme))
    return max(
        toolchain_of(other.plan.target).devices(other.checkpoint, other.plan, other.cache)["peaks"]["while denoising"]
    )


def test_as_many_blocks_as_fit_are_in_the_large_scheme(prepared):
    made = mix_blocks(prepared, 7_600_000_000)
    assert while_denoising(prepared, made.scheme) == made.bytes <= made.budget
    last = made.large - 38 - 1
    assert made.scheme == f"W4BF16,double.00-{last:02d}=W8A8,single.00-37=W8A8"
    assert while_denoising(prepared, f"W4BF16,double.00-{last + 1:02d}=W8A8,single.00-37=W8A8") > made.budget


def test_a_large_budget_has_all_blocks_and_a_small_one_none(prepared):
    assert mix_blocks(prepared, 16_000_000_000).scheme == "W4BF16,double.00-18=W8A8,single.00-37=W8A8"
    least = while_denoising(prepared, "W4BF16")
    assert mix_blocks(prepared, least).scheme == "W4BF16"
    with pytest.raises(ResourceError, match=r"with all blocks in W4BF16, more than the .* GB of --budget"):
        mix_blocks(prepared, least - 1)


@pytest.mark.parametrize(("target", "scheme"), [("trn1", None), ("bm1684x", "W8A8"), ("bm1684x", "double=BF16")])
def test_what_cannot_be_mixed(tmp_path, target, scheme):
    prepared = outline(Settings(target, "tiny-dev", scheme=scheme, build_dir=tmp_path))
    with pytest.raises(SchemeError, match="a budget mixes blocks in W8A8 and in a smaller scheme"):
        mix_blocks(prepared, 1_000_000_000)


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
