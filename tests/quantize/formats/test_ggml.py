"""Formats of GGML: bytes against gguf's own encoder, numbers against its decoder."""

from __future__ import annotations

import gguf
import ml_dtypes
import numpy as np
import pytest

from fluxkiln.errors import SchemeError
from fluxkiln.quantize.formats import FILE_FORMATS

BLOCKS = [name for name, one in FILE_FORMATS.items() if one.module == "blocks"]
GGML = [name for name, one in FILE_FORMATS.items() if one.module in ("blocks", "superblocks")]
SUPER = [name for name, one in FILE_FORMATS.items() if one.module == "superblocks"]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def weight(request):
    """Gaussian rows, and what is easily done wrong: zeros, one sign, two numbers of largest magnitude, tiny ones."""
    rows = np.random.default_rng(0).standard_normal((32, 512)).astype(np.float32) * np.float32(0.03)
    rows[0] = 0
    rows[1] = np.abs(rows[1])
    rows[2] = -np.abs(rows[2])
    rows[3, ::32], rows[3, 5::32] = 0.5, -0.5
    rows[4] *= np.float32(1e-30)
    rows[5] = 0.25
    return rows.astype(getattr(ml_dtypes, request.param, request.param))


def decoded(name, packed):
    return gguf.dequantize(packed, gguf.GGMLQuantizationType[name])


@pytest.mark.parametrize("name", BLOCKS)
def test_bytes_are_those_of_the_formats_own_encoder(name, weight):
    (packed,) = FILE_FORMATS[name].pack(weight)
    np.testing.assert_array_equal(packed, gguf.quantize(weight.astype(np.float32), gguf.GGMLQuantizationType[name]))


@pytest.mark.parametrize("name", GGML)
def test_numbers_are_those_of_the_formats_own_decoder(name, weight):
    planes = FILE_FORMATS[name].pack(weight)
    assert planes[0].shape[1] == FILE_FORMATS[name].row_bytes(512)[0]
    unpacked = FILE_FORMATS[name].unpack(planes)
    np.testing.assert_array_equal(unpacked, decoded(name, planes[0]))
    assert np.isfinite(unpacked).all()
    assert not unpacked[0].any()


# of Gaussian weights; GGML's own encoders leave 0.0055, 0.038, 0.043, 0.078, 0.086, 0.018, 0.036, 0.072
BOUNDS = {"Q8_0": 0.006, "Q5_1": 0.04, "Q5_0": 0.045, "Q4_1": 0.082, "Q4_0": 0.09, "Q6_K": 0.0185, "Q5_K": 0.0375,
          "Q4_K": 0.0745}  # fmt: skip


@pytest.mark.parametrize("name", GGML)
def test_error_of_gaussian_weights(name):
    rows = np.random.default_rng(1).standard_normal((64, 1024)).astype(np.float32)
    found = FILE_FORMATS[name].unpack(FILE_FORMATS[name].pack(rows))
    assert np.linalg.norm(found - rows) / np.linalg.norm(rows) < BOUNDS[name]


@pytest.mark.parametrize("name", SUPER)
def test_channels_that_count_more_have_less_error(name):
    rows = np.random.default_rng(2).standard_normal((64, 512)).astype(np.float32)
    counts = np.where(np.arange(512) % 4 == 0, 20, 1).astype(np.float32)
    errors = [
        float((counts * (FILE_FORMATS[name].unpack(FILE_FORMATS[name].pack(rows, weights)) - rows) ** 2).sum())
        for weights in (None, counts)
    ]
    assert errors[1] < 0.95 * errors[0]


@pytest.mark.parametrize("name", GGML)
def test_some_rows_are_packed_as_in_the_whole(name, weight):
    (whole,) = FILE_FORMATS[name].pack(weight)
    np.testing.assert_array_equal(FILE_FORMATS[name].pack(weight[7:9])[0], whole[7:9])


def test_groups_that_do_not_fit_are_refused():
    with pytest.raises(SchemeError, match=r"Q4_K stores 256 input channels together, which does not divide 128"):
        FILE_FORMATS["Q4_K"].pack(np.zeros((1, 128), np.float32))
