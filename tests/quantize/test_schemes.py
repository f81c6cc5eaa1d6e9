"""Schemes: names there and back, what is refused, and which kind of part gets which."""

from __future__ import annotations

import re

import pytest

from fluxkiln.errors import SchemeError
from fluxkiln.patches.flux1.kinds import KINDS, make_part
from fluxkiln.quantize.schemes import (
    GROUP_SIZES,
    SCHEME_NAMES,
    Scheme,
    block_schemes,
    check_groups,
    form_group,
    parse_scheme,
    parse_schemes,
    part_schemes,
)

MODULATION = ("double_modulation", "single_modulation", "tail_modulation")
BLOCKS = ("t5_block", "double", "single", "double_modulated", "single_modulated", *MODULATION[:2])


@pytest.mark.parametrize("name", SCHEME_NAMES)
def test_names_there_and_back(name):
    assert parse_scheme(name).name == name
    assert parse_scheme(f" {name.lower()} ") == parse_scheme(name)


def test_names_are_distinct():
    assert len({parse_scheme(name) for name in SCHEME_NAMES}) == len(SCHEME_NAMES) == 9


@pytest.mark.parametrize(
    ("text", "name", "compiled"),
    [
        ("W4BF16-ls", "W4BF16", "W4BF16"),
        ("w4bf16-RTN", "W4BF16-rtn", "W4BF16"),
        ("W4BF16-gptq-g128", "W4BF16-g128-gptq", "W4BF16-g128"),
        ("W4BF16-sym-mse", "W4BF16-mse-sym", "W4BF16"),
        ("W8BF16-rtn", "W8BF16", "W8BF16"),
        ("W8BF16-ls", "W8BF16-ls", "W8BF16"),
        ("W4BF16-svd-r32", "W4BF16-svd", "W4BF16-svd"),
        ("W4BF16-r8-svd-g32", "W4BF16-g32-svd-r8", "W4BF16-g32-svd-r8"),
        ("W4BF16-awq", "W4BF16-awq", "W4BF16-awq"),
        ("w4bf16-gptq-bf16:B.c+a*", "W4BF16-gptq-bf16:B.c+a*", "W4BF16-bf16:B.c+a*"),
        ("w8a8-QK6", "W8A8-qk", "W8A8-qk"),
        ("W8A8-bf16:to_v-qk8", "W8A8-qk8-bf16:to_v", "W8A8-qk8-bf16:to_v"),
        ("W4BF16-bf16:a*+B.c+a*", "W4BF16-bf16:B.c+a*", "W4BF16-bf16:B.c+a*"),
    ],
)
def test_methods_are_part_of_a_name_and_not_of_a_mould(text, name, compiled):
    scheme = parse_scheme(text)
    assert (scheme.name, scheme.compiled_name) == (name, compiled)
    assert parse_scheme(scheme.name) == scheme


def test_the_compilers_own_rounding_has_a_name():
    assert parse_scheme("W4BF16").method == "ls"
    assert [parse_scheme(name).rounds_as_compiler for name in ("W4BF16", "W4BF16-rtn", "W8BF16", "BF16")] == [
        False, True, True, True,
    ]  # fmt: skip


def test_default_group_size_may_be_written():
    assert parse_scheme("W4BF16-g64") == parse_scheme("W4BF16")


@pytest.mark.parametrize(
    ("text", "clue"),
    [
        ("W3BF16", "W4BF16"),
        ("", "W4BF16"),
        ("W4F16", "W4BF16"),
        ("W4BF16-g48", "32, 64, 128"),
        ("W4BF16-g0", "32, 64, 128"),
        ("W8BF16-g64", "only W4BF16 has groups"),
        ("BF16-g64", "only W4BF16 has groups"),
        ("W4BF16-g", "W4BF16-g128"),
        ("W4BF16-best", "-awq, -gptq, -ls, -mse, -rtn, -rtn0, -svd"),
        ("W4BF16-ls-gptq", "says two things about its method"),
        ("W4BF16-g32-g64", "says two things about its group size"),
        ("W4BF16-gptq-sym", "gptq has no symmetric form; ls, mse have one"),
        ("W4BF16-ls-r8", "rank 8 of method ls"),
        ("W4BF16-svd-r0", "rank 0 of method svd"),
        ("BF16-ls", "does not quantize, so it has no methods"),
        ("BF16-bf16:a", "BF16 does not quantize, so no weight"),
        ("W4BF16-bf16:", "'' is no pattern of weights"),
        ("W8A8-gptq", "W8A8 has a way of its own to find codes; leave gptq out"),
        ("W8A8-g32", "only W4BF16 has groups"),
        ("W8A8-qk0", "no scheme is called 'W8A8-qk0'"),
        ("W8A8-qk-qk4", "says two things about its limit"),
        ("W4BF16-qk", "no scheme is called 'W4BF16-qk'"),
        ("W4BF16-bf16:a;b", "'a;b' is no pattern of weights"),
    ],
)
def test_unknown_schemes_are_refused_with_the_legal_ones(text, clue):
    with pytest.raises(SchemeError, match=clue) as caught:
        parse_scheme(text)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(("bits", "group_size"), [(3, 64), (16, 0), (4, 0), (4, 256), (8, 0)])
def test_illegal_values_are_refused(bits, group_size):
    with pytest.raises(SchemeError):
        Scheme("BF16", weight_bits=bits, group_size=group_size)


def test_every_kind_has_a_scheme():
    for name in SCHEME_NAMES:
        assert part_schemes(parse_scheme(name), KINDS).keys() == KINDS.keys()


@pytest.mark.parametrize("name", ["W4BF16", "W4BF16-g128", "W8BF16"])
def test_only_blocks_are_quantized(name):
    blocks = parse_scheme(name)
    schemes = part_schemes(blocks, KINDS)
    assert {kind for kind, scheme in schemes.items() if scheme.weight_bits} == set(BLOCKS)
    assert all(schemes[kind] == blocks for kind in BLOCKS)
    assert {kind: schemes[kind].name for kind in ("clip", "t5_embed", "t5_final", "head", "tail", "vae_decoder")} == {
        "clip": "F16",
        "t5_embed": "F16",
        "t5_final": "BF16",
        "head": "BF16",
        "tail": "BF16",
        "vae_decoder": "F16",
    }


def test_inputs_in_8_bits_are_for_the_transformers_blocks():
    blocks, schemes = parse_schemes("W8A8", "W4BF16", KINDS)
    assert (blocks.name, blocks.integer, blocks.calibrated, blocks.codes_only) == ("W8A8", True, True, False)
    integer = {kind for kind, scheme in schemes.items() if scheme.integer}
    assert integer == {"double", "single", "double_modulated", "single_modulated"}
    plain = part_schemes(parse_scheme("W4BF16"), KINDS)
    assert {kind: schemes[kind] for kind in KINDS.keys() - integer} == {
        kind: plain[kind] for kind in KINDS.keys() - integer
    }
    _, mixed = parse_schemes("W8A8,double=W4BF16-gptq,single.proj_out=BF16", "W4BF16", KINDS)
    assert (mixed["double"].name, mixed["single"].name) == ("W4BF16-gptq", "W8A8-bf16:proj_out")
    with pytest.raises(SchemeError, match=r"t5_block cannot be W8A8, .* 8 bits; double, single can"):
        parse_schemes("W4BF16,t5_block=W8A8", "W4BF16", KINDS)


def test_f32_is_f32_throughout():
    assert {scheme.name for scheme in part_schemes(parse_scheme("F32"), KINDS).values()} == {"F32"}


def test_t5_never_runs_in_f16():
    schemes = part_schemes(parse_scheme("F16"), KINDS)
    assert {kind for kind, scheme in schemes.items() if scheme.name != "F16"} == {"t5_block", "t5_final"}


def test_one_kind_may_have_its_own_scheme():
    blocks, schemes = parse_schemes("W4BF16, vae_decoder=BF16,single=W8BF16", "BF16", KINDS)
    plain = part_schemes(parse_scheme("W4BF16"), KINDS)
    assert blocks.name == "W4BF16"
    changed = {kind: scheme.name for kind, scheme in schemes.items() if scheme != plain[kind]}
    assert changed == {"vae_decoder": "BF16", "single": "W8BF16", "single_modulated": "W8BF16"}


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("modulation", MODULATION),
        ("double_modulation", ("double_modulation",)),
        ("head", ("head", "time_embed", "token_embed")),
        ("double", ("double", "double_modulated")),
        ("tail", ("tail", "tail_modulated")),
        ("double_modulated", ("double_modulated",)),
    ],
)
def test_an_exception_holds_for_both_forms(name, kinds):
    """What is said of a kind of the inline form holds for what it becomes; the modulation is spoken of as one."""
    _, schemes = parse_schemes(f"W4BF16,{name}=F32", "BF16", KINDS)
    assert {kind for kind, scheme in schemes.items() if scheme.name == "F32"} == set(kinds)


def test_a_later_exception_overrides():
    _, schemes = parse_schemes("W4BF16,modulation=BF16,tail_modulation=F32", "BF16", KINDS)
    assert [schemes[kind].name for kind in MODULATION] == ["BF16", "BF16", "F32"]


@pytest.mark.parametrize("text", [None, "", "tail=F32"])
def test_the_default_is_taken_where_nothing_is_said(text):
    blocks, schemes = parse_schemes(text, "W4BF16-g32", KINDS)
    assert blocks.name == "W4BF16-g32"
    assert schemes["tail"].name == ("F32" if text else "BF16")


@pytest.mark.parametrize("text", ["W4BF16,middle=BF16", "W4BF16,single=W5", "W4BF16,single", "single=BF16,W4BF16"])
def test_exceptions_that_do_not_exist_are_refused(text):
    with pytest.raises(SchemeError):
        parse_schemes(text, "BF16", KINDS)


@pytest.mark.parametrize("size", GROUP_SIZES)
def test_groups_that_divide_pass(size):
    check_groups(Scheme("BF16", weight_bits=4, group_size=size), "a.weight", 3072)


@pytest.mark.parametrize(
    ("name", "width", "remedy"),
    [
        ("W4BF16-g128", 192, "use W4BF16-g32 or W4BF16$"),
        ("W4BF16", 96, "use W4BF16-g32$"),
        ("W4BF16", 40, "use BF16$"),
        ("W8BF16", 96, "use W4BF16-g32$"),
    ],
)
def test_groups_that_do_not_divide_name_the_ones_that_do(name, width, remedy):
    with pytest.raises(SchemeError, match=remedy) as caught:
        check_groups(parse_scheme(name), "blocks.0.weight", width)
    assert "blocks.0.weight" in str(caught.value)
    assert str(width) in str(caught.value)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_unquantized_schemes_have_no_groups(name):
    check_groups(parse_scheme(name), "a.weight", 7)


def test_single_weights_stay_as_they_are():
    _, schemes = parse_schemes("W4BF16-gptq, single.proj_out=BF16,single.attn.to_[qk]=bf16", "BF16", KINDS)
    kept = {kind: scheme.name for kind, scheme in schemes.items() if scheme.kept}
    name = "W4BF16-gptq-bf16:attn.to_[qk]+proj_out"
    assert kept == dict.fromkeys(("single", "single_modulated", "single_modulation"), name)
    assert parse_scheme(name) == schemes["single"]
    assert schemes["single"].base_name == "W4BF16"
    for slot, keeps in (
        ("proj_out.weight__s1.0.256__t", True), ("attn.to_q.weight__t", True), ("attn.to_k.weight", True),
        ("attn.to_v.weight__t", False), ("attn.to_q.lora", False), ("proj_mlp.weight", False),
    ):  # fmt: skip
        assert schemes["single"].keeps(slot) == keeps, slot
        assert not schemes["double"].keeps(slot)
    # what is said of the whole kind later takes the place of all that
    assert not parse_schemes("W4BF16,single.proj_out=BF16,single=W8BF16", "BF16", KINDS)[1]["single"].kept


def test_the_weights_of_a_block_are_in_either_form_of_it():
    forms = ("double", "double_modulation", "double_modulated")
    assert form_group(KINDS, "double_modulation") == form_group(KINDS, "double") == forms
    assert form_group(KINDS, "t5_block") == ("t5_block",)
    _, schemes = parse_schemes("W4BF16,modulation=BF16,double.norm1.linear=BF16", "BF16", KINDS)
    assert [schemes[kind].name for kind in forms] == ["W4BF16-bf16:norm1.linear", "BF16", "W4BF16-bf16:norm1.linear"]


@pytest.mark.parametrize(
    ("text", "clue"),
    [
        ("W4BF16,middle.a=BF16", "no kind of part is called 'middle'"),
        ("W4BF16,single.proj_out=W8BF16", r"cannot be W8BF16: .* write single\.proj_out=BF16"),
        ("W4BF16,single.proj_out=F16", r"write single\.proj_out=BF16"),
        ("BF16,single.proj_out=BF16", "single is not quantized, it is BF16 as a whole"),
        ("W4BF16,vae_decoder.conv_in=F16", "vae_decoder is not quantized, it is F16 as a whole"),
        ("W4BF16,single.=BF16", "'' is no pattern of weights"),
    ],
)
def test_weights_that_cannot_be_left_out(text, clue):
    with pytest.raises(SchemeError, match=clue):
        parse_schemes(text, "BF16", KINDS)


PARTS = [make_part(f"double.{index:02d}", "double_modulated", "") for index in range(3)]
PARTS += [make_part("double_modulation.00", "double_modulation", ""), make_part("single.00", "single_modulated", "")]


def test_blocks_may_have_schemes_of_their_own():
    text = "W8A8,double.00-01=W4BF16-gptq, single.00=BF16,single.proj_out=BF16"
    assert {name: scheme.name for name, scheme in block_schemes(text, PARTS).items()} == {
        "double.00": "W4BF16-gptq", "double.01": "W4BF16-gptq", "single.00": "BF16",
    }  # fmt: skip
    assert block_schemes(None, PARTS) == block_schemes("W4BF16", PARTS) == {}
    _, schemes = parse_schemes(text, "W4BF16", KINDS)
    assert schemes["double_modulated"].name == "W8A8"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("W8A8,double.02-03=BF16", "double.02-03 is not there; its blocks are double.00 to double.02"),
        ("W8A8,double.02-01=BF16", "double.02-01 is not there"),
        ("W8A8,triple.00=BF16", "triple.00 is not there; there are no blocks called triple"),
        ("W8A8,double.00-01=BF16,double.01=W4BF16", "double.01 is given twice"),
        ("W8A8,double.00=W3", "no scheme is called 'W3'"),
    ],
)
def test_blocks_that_are_not_there(text, message):
    with pytest.raises(SchemeError, match=re.escape(message)):
        block_schemes(text, PARTS)
