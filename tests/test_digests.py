from __future__ import annotations

from pathlib import Path

import pytest

from fluxkiln.digests import canonical_json, digest_json


def test_order_of_mappings_does_not_count():
    assert canonical_json({"b": [1, {"d": 1, "c": 2}], "a": "é"}) == '{"a":"é","b":[1,{"c":2,"d":1}]}'.encode()


def test_values_that_python_calls_equal_stay_apart():
    values = [1, 1.0, True, "1", None, [1], {"1": 1}, ""]
    assert len({digest_json(value) for value in values}) == len(values)


@pytest.mark.parametrize("value", [Path("/tmp"), {1: 2}, {"a": {1, 2}}, [b"bytes"], 1j])
def test_what_is_no_json_is_refused(value):
    with pytest.raises(TypeError):
        canonical_json(value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_with_its_place(value):
    with pytest.raises(ValueError, match=r"value\.parity\[1\]"):
        canonical_json({"parity": [0.5, value]})
