"""Number formats and orders of the chip against definitions written one number at a time."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from fluxkiln.compile.toolchains.tpu_mlir.forms import deal_lanes, group_channels, store_as
from fluxkiln.compile.toolchains.tpu_mlir.transposed import Transposed

RNG = np.random.default_rng(0)


def bits(*words):
    return np.array(words, np.uint32).view(np.float32)


def test_bfloat16_is_to_nearest_and_has_no_subnormals():
    values = bits(0x3F808000, 0x3F818000, 0x3F808001, 0x007F7FFF, 0x007FFFFF, 0x80400000, 0x00800000, 0x80000000)
    # ties go to even; what rounds up to the least normal number stays, what remains below it becomes a signed zero
    expected = [0x3F80, 0x3F82, 0x3F81, 0x0000, 0x0080, 0x8000, 0x0080, 0x8000]
    assert store_as(values, "bf16").tolist() == expected
    assert store_as(bits(0x7F800000, 0xFF800000, 0x7F7FFFFF), "bf16").tolist() == [0x7F80, 0xFF80, 0x7F80]
    narrow = np.array([0x0001, 0x807F, 0x0080, 0x3F80], np.uint16).view(ml_dtypes.bfloat16)
    assert store_as(narrow, "bf16").tolist() == [0, 0x8000, 0x0080, 0x3F80]


def test_float16_keeps_subnormals_and_overflows_to_infinity():
    values = np.array([65504, 65519, 65520, -1e5, 5.96e-8, 2.98e-8, 2.99e-8, 1 + 2**-11, 1 + 3 * 2**-11], np.float32)
    expected = [0x7BFF, 0x7BFF, 0x7C00, 0xFC00, 1, 0, 1, 0x3C00, 0x3C02]
    assert store_as(values, "f16").view(np.uint16).tolist() == expected
    every = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    assert store_as(every, "f16").tobytes() == store_as(every.astype(np.float32), "f16").tobytes()


@pytest.mark.parametrize("storage", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_views_are_stored_as_what_they_show(storage, dtype):
    values = RNG.standard_normal((8, 6)).astype(dtype)
    for view in (values, values[:, 2:], values.T, values[::3]):
        stored = store_as(view, storage)
        assert stored.shape == view.shape
        assert stored.flags.c_contiguous
        assert stored.tobytes() == store_as(np.array(view, np.float32), storage).tobytes()


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (128, 256), (192, 320), (64, 130), (72, 64), (1, 5), (3, 512)])
@pytest.mark.parametrize("dtype", [np.uint16, np.float16, np.float32])
def test_transposed_in_blocks(rows, columns, dtype):
    whole = RNG.integers(0, 60000, (rows, columns)).astype(dtype)
    space = np.full(whole.nbytes, 0xAA, np.uint8)
    made = Transposed((columns, rows), np.dtype(dtype), space)
    starts = list(range(0, rows, 64))
    for start in starts[::-1]:
        made.put(np.ascontiguousarray(whole[start : start + 64]), start)
    blocks = [block.copy() for block in made.blocks(4096)]
    assert all(block.dtype == dtype and block.shape[1] == rows for block in blocks)
    assert np.concatenate(blocks).tobytes() == np.ascontiguousarray(whole.T).tobytes()


@pytest.mark.parametrize("lanes", [64, 32])
def test_lanes_are_dealt_row_by_row(lanes):
    rows = np.arange(3 * lanes * 2).reshape(-1, 2)
    made = deal_lanes(rows, lanes)
    for lane, turn in ((0, 0), (5, 1), (lanes - 1, 2)):
        assert made[lane, turn].tolist() == rows[turn * lanes + lane].tolist()
    with pytest.raises(ValueError, match="reshape"):
        deal_lanes(rows[:50], lanes)


@pytest.mark.parametrize("merged", ["", "kh", "kw", "khw"])
def test_channels_are_grouped(merged):
    weight = RNG.integers(1, 60000, (4, 40, 3, 2)).astype(np.uint16)
    made = group_channels(weight, merged)
    kernel = {"": 6, "kh": 2, "kw": 3, "khw": 1}[merged]
    assert made.shape == (4, -(-40 * 6 // kernel // 32), kernel, 32)
    for o, i, h, w in np.ndindex(weight.shape):
        channel, tap = {
            "": (i, h * 2 + w), "kh": (i * 3 + h, w), "kw": (i * 2 + w, h), "khw": ((i * 3 + h) * 2 + w, 0),
        }[merged]  # fmt: skip
        assert made[o, channel // 32, tap, channel % 32] == weight[o, i, h, w]
    assert np.count_nonzero(made) == weight.size  # all else is padding
