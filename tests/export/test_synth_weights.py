"""Random weights: distinct, of the asked size, the same everywhere."""

from __future__ import annotations

import hashlib
import re

import numpy as np
import pytest

from fluxkiln.export.synth import tensor_bits
from fluxkiln.patches.flux1.presets import PRESETS, RULES
from fluxkiln.patches.flux1.statistics import FLUX
from fluxkiln.patches.flux1.tensors import component_layout
from fluxkiln.patches.model import Pin, WeightRule

TINY = PRESETS["tiny-dev"].configs


def values(component, name, shape, seed=0, rules=RULES):
    bits = np.concatenate(list(tensor_bits(rules[component], component, seed, name, shape)))
    return (bits.astype(np.uint32) << 16).view(np.float32).reshape(shape)


def all_tensors():
    for component in RULES:
        for name, shape in component_layout(component, TINY[component]).items():
            yield component, name, shape


def test_every_tensor_is_distinct():
    seen = {}
    for component, name, shape in all_tensors():
        digest = hashlib.sha256(values(component, name, shape).tobytes()).hexdigest()
        assert digest not in seen, (name, seen[digest])
        seen[digest] = name


def test_no_tensor_is_constant_zero_or_wild():
    for component, name, shape in all_tensors():
        tensor = values(component, name, shape)
        assert np.isfinite(tensor).all()
        assert np.abs(tensor).max() < 4, name
        assert tensor.std() > 1e-3, name
        if name.endswith(".bias"):
            assert (tensor != 0).all(), name


def test_norms_are_near_one_and_not_one():
    norms = [
        entry for entry in all_tensors() if re.search(r"norm\w*\d?\.weight$|norm_(added_)?[qk]\.weight$", entry[1])
    ]
    assert len(norms) > 50
    for component, name, shape in norms:
        tensor = values(component, name, shape)
        assert 0.8 < tensor.mean() < 1.5, name
        assert 0.1 < tensor.std() < 0.3, name


def test_linear_weights_keep_the_scale():
    """Their standard deviation goes with one over the square root of the inputs, whatever the size."""
    for width in (256, 3072):
        tensor = values("transformer", "transformer_blocks.0.attn.to_q.weight", (width, width))
        assert tensor.std() * width**0.5 == pytest.approx(1, rel=0.02)
        assert abs(tensor.mean()) < 0.02 * tensor.std()


def test_large_tensors_have_full_rank_and_no_equal_rows():
    tensor = values("transformer", "transformer_blocks.0.attn.to_q.weight", (2048, 2048))
    assert len({row.tobytes() for row in tensor}) == 2048
    assert len({column.tobytes() for column in tensor.T}) == 2048
    spectrum = np.linalg.svd(tensor[:512], compute_uv=False)
    # Of independent entries: 1 +- sqrt(512 / 2048).
    assert spectrum.max() < 1.6
    assert spectrum.min() > 0.4


def test_gates_are_larger_than_shifts():
    """AdaLN's rows are shift, scale, gate, twice in double blocks."""
    bias = values("transformer", "transformer_blocks.0.norm1.linear.bias", (6 * 256,)).reshape(6, 256)
    assert bias.std(axis=1) == pytest.approx([0.1, 0.3, 0.45] * 2, rel=0.1)


def test_seed_and_name_decide():
    name, shape = "x_embedder.weight", (256, 64)
    first = values("transformer", name, shape)
    np.testing.assert_array_equal(first, values("transformer", name, shape))
    assert not np.array_equal(first, values("transformer", name, shape, seed=1))
    assert not np.array_equal(first, values("transformer", "context_embedder.weight", shape))


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (RULES, "3253066209a067540d4176924bc4b956121a0208832466a6944db63eaf565a65"),
        (FLUX, "8fac5fd3c56a501b9e4aa551ed9270a454a64dbc38618e31d6a3c0fafb71b94a"),
    ],
    ids=["uniform", "flux"],
)
def test_the_same_bytes_on_every_machine(rules, expected):
    """Where this changes, raise GENERATOR: cached synthetic checkpoints are keyed by it."""
    digest = hashlib.sha256()
    for component, name, shape in all_tensors():
        for bits in tensor_bits(rules[component], component, 0, name, shape):
            digest.update(bits.astype("<u2").tobytes())
    for bits in tensor_bits(
        rules["transformer"], "transformer", 0, "single_transformer_blocks.7.proj_mlp.weight", (1024, 3072)
    ):
        digest.update(bits.astype("<u2").tobytes())
    assert digest.hexdigest() == expected


def kurtosis(tensor):
    squares = np.square(tensor, dtype=np.float64)
    return np.square(squares).mean() / squares.mean() ** 2


def test_tails():
    """Uniform numbers have a kurtosis of 1.8; columns of three sizes make 5 of long tails more."""
    name, shape = "transformer_blocks.0.attn.to_q.weight", (1024, 3072)
    plain = values("transformer", name, shape)
    tailed = values("transformer", name, shape, rules=FLUX)
    assert kurtosis(plain) == pytest.approx(1.8, rel=0.01)
    assert kurtosis(tailed) == pytest.approx(5 * 1.68, rel=0.1)
    assert np.abs(plain).max() / plain.std() < 1.8
    assert np.abs(tailed).max() / tailed.std() > 10
    # the scale of the whole is the same
    assert tailed.std() == pytest.approx(plain.std(), rel=0.03)
    assert kurtosis(tailed[:, np.argsort(tailed.std(axis=0))[1000:2000]]) == pytest.approx(5, rel=0.1)


def sizes(tensor, axis):
    """Size of every row or column, in octaves of the median one."""
    found = tensor.std(axis=axis)
    return np.log2(found / np.median(found))


def test_rows_and_columns_differ_by_powers_of_two():
    name, shape = "single_transformer_blocks.1.proj_mlp.weight", (2048, 3072)
    drawn = values("transformer", name, shape, rules=FLUX)
    columns, rows = sizes(drawn, 0), sizes(drawn, 1)
    for found, octaves, shares in (
        (columns, (-1, 0, 1), (1 / 8, 6 / 8, 1 / 8)),
        (rows, (0, 1, 3), (27 / 32, 4 / 32, 1 / 32)),
    ):
        for octave, share in zip(octaves, shares, strict=True):
            assert (np.abs(found - octave) < 0.4).mean() == pytest.approx(share, abs=0.03)
    # in every chunk of rows the same columns
    np.testing.assert_allclose(sizes(drawn[:400], 0), columns, atol=0.8)
    plain = values("transformer", name, shape)
    assert np.abs([*sizes(plain, 0), *sizes(plain, 1)]).max() < 0.1


def test_pins_stand_where_they_are_wherever_chunks_end():
    pins = (Pin(0, 0.0, 3.0), Pin(0, 0.999, -2.0, 0.5), Pin(1, 0.5, 0.25, 0.75))
    for columns in ((), (-1, 1)):
        rule = WeightRule("", 1.0, runs=(1.0, 1.0), columns=columns, pins=pins)
        drawn = values("x", "y", (4000, 256), rules={"x": (rule,)})
        unpinned = values("x", "y", (4000, 256), rules={"x": (WeightRule("", 1.0, runs=(1.0, 1.0), columns=columns),)})
        assert (drawn[0, 0], drawn[1998, 128], drawn[3000, 192]) == (3, -2, 0.25)
        assert (drawn != unpinned).sum() == 3


@pytest.mark.parametrize("rules", [RULES, FLUX], ids=["uniform", "flux"])
def test_no_value_is_zero_or_subnormal(rules):
    """Adding to the exponent of such a value would make another of it."""
    drawn = np.abs(values("transformer", "transformer_blocks.0.ff.net.2.weight", (1024, 3072), rules=rules))
    assert drawn.min() > 1e-9
