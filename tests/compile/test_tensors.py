"""Tensors of a part by name: what a scheme keeps of them, what that leaves, and bytes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from fluxkiln.build.make import outline
from fluxkiln.compile.tensors import check_weights, part_bytes, part_refs, quantizable
from fluxkiln.errors import SchemeError
from fluxkiln.settings import Settings
from tests.builds import Build, altered


def build_of(target, scheme, **others):
    prepared = outline(Settings(target, "tiny-dev", scheme=scheme, components=("transformer",), **others))
    return Build(prepared.checkpoint, prepared.plan, prepared.cache)


def bm1684x_build(scheme, **others):
    return build_of("bm1684x", scheme, **others)


def test_patterns_go_to_the_kinds_that_have_such_weights():
    build = bm1684x_build("W4BF16,double.norm1*=BF16,double.ff.*=BF16,single.proj_*=BF16")
    assert {kind: build.plan.schemes[kind].kept for kind in build.plan.kinds() if build.plan.schemes[kind].kept} == {
        "double_modulated": ("ff.*",), "single_modulated": ("proj_*",),
    }  # fmt: skip
    # all that it has is kept, so it is a kind without codes
    assert build.plan.schemes["double_modulation"].name == "BF16"
    assert build.plan.schemes["single_modulation"].name == "W4BF16"
    inline = bm1684x_build("W4BF16,double.norm1*=BF16", modulation="inline")
    assert inline.plan.schemes["double"].name == "W4BF16-bf16:norm1*"


@pytest.mark.parametrize(
    ("exception", "clue"),
    [
        (
            "single.proj_in=BF16",
            r"no weight of single is called 'proj_in'; there are norm\.linear, proj_mlp, proj_out",
        ),
        ("double_modulation.attn.to_q=BF16", r"no weight of double is called 'attn\.to_q'"),
        ("single.proj_out=BF16,double.proj_out=BF16", "no weight of double is called 'proj_out'"),
        ("single.attn.norm_q=BF16", "no weight of single is called 'attn.norm_q'"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_with_what_there_is(exception, clue):
    with pytest.raises(SchemeError, match=clue):
        bm1684x_build(f"W4BF16,{exception}")


def test_long_schemes_have_short_folders():
    def name(scheme):
        return outline(Settings("bm1684x", "tiny-dev", scheme=scheme, components=("transformer",))).name

    plain, odd, other = (name(f"W4BF16{more}") for more in ("", ",single.proj_*=BF16", ",single.attn.*=BF16"))
    assert len({plain, odd, other}) == 3
    assert all(sign not in odd for sign in "*?[],=:")
    assert "single.proj_out-bf16" in name("W4BF16,single.proj_out=BF16")
    assert outline(Settings("bm1684x", "tiny-dev", scheme="single.proj_*=BF16")).name.startswith("tiny-dev-w4bf16-")


def test_bytes():
    build = bm1684x_build("W4BF16-svd-r8,single.proj_out=BF16")
    part = next(part for part in build.parts if part.kind == "single_modulated")
    matrices = {name: math.prod(ref.shape) for name, ref in quantizable(build.checkpoint, build.plan, part).items()}
    branches = sum(
        2 * 8 * sum(ref.shape)
        for name, ref in quantizable(build.checkpoint, build.plan, part).items()
        if "proj_out" not in name
    )
    coded = sum(size for name, size in matrices.items() if "proj_out" not in name)
    rest = sum(math.prod(ref.shape) for ref in part_refs(build.checkpoint, build.plan, part)) - coded
    assert part_bytes(build.checkpoint, build.plan, part) == coded // 2 + 3 * coded // 64 + branches + 2 * rest
    plain = altered(build, schemes={**build.plan.schemes, part.kind: build.plan.schemes["token_embed"]})
    assert part_bytes(plain.checkpoint, plain.plan, part) == 2 * (coded + rest)


def test_what_is_kept_needs_no_groups():
    """A width that no group divides: refused in codes, and not where it is kept."""
    build = bm1684x_build("W4BF16-g128,single.proj_out=BF16")
    parts = tuple(part for part in build.parts if part.kind == "single_modulated")
    refs = {}
    for name, ref in build.checkpoint.tensors["transformer"].items():
        odd = name.endswith("proj_out.weight") and len(ref.shape) == 2
        refs[name] = replace(ref, shape=(ref.shape[0], 1000)) if odd else ref
    odd = replace(altered(build, parts=parts), checkpoint=replace(build.checkpoint, tensors={"transformer": refs}))
    check_weights(odd.checkpoint, odd.plan)
    schemes = odd.plan.schemes
    plain = altered(odd, schemes={**schemes, "single_modulated": replace(schemes["single_modulated"], kept=())})
    with pytest.raises(SchemeError, match="does not divide the 1000 input channels"):
        check_weights(plain.checkpoint, plain.plan)


def narrowed(small_build, width=96):
    """The kiln with blocks whose queries and outputs are `width` channels."""
    refs = {
        name: replace(ref, shape=(width, ref.shape[1])) if name.endswith(("to_q.weight", "proj_out.weight")) else ref
        for name, ref in small_build.checkpoint.tensors["transformer"].items()
    }
    return replace(small_build, checkpoint=replace(small_build.checkpoint, tensors={"transformer": refs}))


def check(build):
    check_weights(build.checkpoint, build.plan)


@pytest.mark.parametrize("scheme", ["W4BF16-g32", "W8BF16"])
def test_output_channels_that_no_lanes_take_are_refused_with_what_helps(scheme):
    """The groups divide; the compiler would take minutes, and leave the last 32 rows in BF16."""
    with pytest.raises(SchemeError) as caught:
        check(narrowed(bm1684x_build(scheme)))
    assert str(caught.value) == (
        "transformer_blocks.0.attn.to_q.weight has 96 output channels; bm1684x takes codes of a weight with a multiple "
        "of 64 or fewer than 64, whatever its groups: ask for BF16, or leave such weights out of the codes, "
        "--scheme 'SCHEME,double.attn.to_q=BF16,single.proj_out=BF16,single.attn.to_q=BF16'"
    )
    check(narrowed(bm1684x_build(f"{scheme},double.attn.to_q=BF16,single.proj_out=BF16,single.attn.to_q=BF16")))
    check(narrowed(bm1684x_build(scheme), width=48))
    check(narrowed(bm1684x_build("BF16")))


def test_lanes_are_the_chips():
    build = build_of("bm1688", "W4BF16-g32")
    check(narrowed(build))
    with pytest.raises(SchemeError, match=r"has 48 output channels; bm1688 takes codes .* a multiple of 32, whatever"):
        check(narrowed(build, width=48))
    with pytest.raises(SchemeError, match="has 16 output channels; bm1688"):
        check(narrowed(build, width=16))
    check(narrowed(build_of("cpu", "W4BF16-g32"), width=48))
