"""One syntax for what is stored otherwise: places, and patterns in the name of a scheme."""

from __future__ import annotations

import pytest

from fluxkiln.errors import SchemeError
from fluxkiln.patches.flux1.model import MODEL
from fluxkiln.quantize.schemes import (
    matches,
    parse_exception,
    parse_scheme,
    parse_schemes,
    weight_name,
    with_exceptions,
)


def test_exceptions_there_and_back():
    text = with_exceptions("W4BF16", ["single.proj_out", "double.attn.*"], "BF16")
    assert text == "W4BF16,single.proj_out=BF16,double.attn.*=BF16"
    assert [parse_exception(one, "") for one in text.split(",")[1:]] == [
        ("single.proj_out", "BF16"), ("double.attn.*", "BF16"),
    ]  # fmt: skip
    _, schemes = parse_schemes(text, "BF16", MODEL.kinds)
    assert (schemes["single"].name, schemes["double"].name) == ("W4BF16-bf16:proj_out", "W4BF16-bf16:attn.*")


@pytest.mark.parametrize("text", ["single", "=BF16", "single:BF16", ""])
def test_what_is_no_exception_is_refused(text):
    with pytest.raises(SchemeError, match=f"exception '{text}' is not PLACE=SCHEME; a place is a kind"):
        parse_exception(text, "a kind")
    with pytest.raises(SchemeError, match="is not PLACE=SCHEME"):
        parse_schemes(f"W4BF16,{text}", "BF16", MODEL.kinds)


def test_patterns_in_a_name():
    assert parse_scheme("W4BF16-bf16:A.b+c*").kept == ("A.b", "c*")
    assert parse_scheme("W4BF16-bf16:A.b+c*").name == "W4BF16-bf16:A.b+c*"
    assert parse_scheme("w4bf16-BF16:a").kept == ("a",)
    assert parse_scheme("W4BF16-g32-ls").kept == ()


def test_a_weight_is_matched_by_its_name_in_the_checkpoint():
    slot = "proj_out.weight__s1.0.256__t"
    assert weight_name(slot) == "proj_out"
    assert all(matches(pattern, slot) for pattern in ("proj_out", "proj_out.weight", "proj_*", "*"))
    assert not any(matches(pattern, slot) for pattern in ("proj", "*__t", "norm*"))
