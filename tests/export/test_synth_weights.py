"""Random weights: distinct, of the asked size, the same everywhere."""

from __future__ import annotations

import hashlib
import re

import numpy as np
import pytest

from fluxkiln.export.synth import tensor_bits
from fluxkiln.patches.flux1.presets import PRESETS, RULES
from fluxkiln.patches.flux1.tensors import component_layout

TINY = PRESETS["tiny-dev"].configs


def values(component, name, shape, seed=0):
    bits = np.concatenate(list(tensor_bits(RULES[component], component, seed, name, shape)))
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


def test_the_same_bytes_on_every_machine():
    """Where this changes, raise GENERATOR: cached synthetic checkpoints are keyed by it."""
    digest = hashlib.sha256()
    for component, name, shape in all_tensors():
        for bits in tensor_bits(RULES[component], component, 0, name, shape):
            digest.update(bits.astype("<u2").tobytes())
    for bits in tensor_bits(
        RULES["transformer"], "transformer", 0, "single_transformer_blocks.7.proj_mlp.weight", (1024, 3072)
    ):
        digest.update(bits.astype("<u2").tobytes())
    assert digest.hexdigest() == "3253066209a067540d4176924bc4b956121a0208832466a6944db63eaf565a65"
