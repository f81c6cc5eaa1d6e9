"""Every form against its definition, and what is read for it."""

from __future__ import annotations

from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest

from fluxkiln.compile.toolchains.tpu_mlir.forms import (
    BLOCK_BYTES,
    LANES,
    Form,
    FormMaker,
    SlotRows,
    candidates,
    deal_lanes,
    form_bytes,
    group_channels,
    store_as,
)
from tests.quantize.weights import pack_int4, pack_int8

SHAPES = ((192, 128), (192,), (24,), (64, 16, 3, 3), (3, 32, 3, 3))


def weight_of(shape):
    return np.random.default_rng(3).standard_normal(shape).astype(ml_dtypes.bfloat16)


def rows_of(weight):
    return SlotRows(weight.shape, lambda start, stop: weight[start:stop])


def made(weight, name, group_size=0, bits=0, **cut):
    return FormMaker(group_size, bits).make(Form("w", name, **cut), rows_of(weight)).tobytes()


def test_codes_scales_and_zeros_are_the_packers():
    weight = weight_of((192, 128))
    for bits, pack in ((4, pack_int4), (8, pack_int8)):
        packed = pack(weight, 64)
        assert made(weight, "codes", 64, bits) == packed.codes_OI.tobytes()
        assert made(weight, "scale", 64, bits) == packed.scales_OG.tobytes()
        assert made(weight, "zero", 64, bits) == packed.zeros_OG.tobytes()
        pairs = np.frombuffer(made(weight, "pairs", 64, bits), ml_dtypes.bfloat16).reshape(192, 2, 2)
        assert np.array_equal(pairs[:, :, 0], packed.zeros_OG)
        assert np.array_equal(pairs[:, :, 1].view(np.uint16), packed.scales_OG)
        for dealt, lanes in LANES.items():
            assert made(weight, f"scale_{dealt}", 64, bits) == deal_lanes(packed.scales_OG, lanes).tobytes()
            assert made(weight, f"zero_{dealt}", 64, bits) == deal_lanes(packed.zeros_OG, lanes).tobytes()


@pytest.mark.parametrize("storage", ["bf16", "f16", "f32"])
def test_unquantized_forms(storage):
    weight = weight_of((192, 128))
    stored = store_as(weight, storage)
    assert made(weight, storage) == stored.tobytes()
    assert made(weight, f"{storage}_t") == np.ascontiguousarray(stored.T).tobytes()
    several = weight_of((128, 1024))  # strips
    assert made(several, f"{storage}_t") == np.ascontiguousarray(store_as(several, storage).T).tobytes()
    doubled = store_as(weight.astype(np.float32) * 2, storage)
    assert made(weight, storage, factor=2.0) == doubled.tobytes() != stored.tobytes()
    if storage != "f32":
        kernel, vector = weight_of((64, 16, 3, 3)), weight_of((24,))
        for sides in ("", "kh", "kw", "khw"):
            name = f"{storage}_grouped{'_' if sides else ''}{sides}"
            assert made(kernel, name) == group_channels(store_as(kernel, storage), sides).tobytes()
        # the 1 x 1 convolution that multiplies each channel by its own number
        diagonal = np.frombuffer(made(vector, f"{storage}_diagonal"), store_as(vector, storage).dtype).reshape(24, 32)
        assert diagonal[:, :24].tobytes() == np.diag(store_as(vector, storage)).tobytes()
        assert not diagonal[:, 24:].any()


@pytest.mark.parametrize("name", ["codes", "scale", "zero", "scale_lanes", "bf16", "bf16_t", "f16_t", "f32"])
def test_chunks_are_slices_of_the_output_channels(name):
    weight = weight_of((192, 128))
    for chunk in range(3):
        cut = np.ascontiguousarray(weight[chunk * 64 : (chunk + 1) * 64])
        assert made(weight, name, 64, 4, chunk=chunk, chunks=3) == made(cut, name, 64, 4)


def test_chunks_are_slices_of_the_input_channels():
    weight = weight_of((192, 128))
    halves = [made(weight, "bf16_t", chunk=chunk, chunks=2, axis=1) for chunk in (0, 1)]
    assert b"".join(halves) == made(weight, "bf16_t")
    assert halves[1] == made(np.ascontiguousarray(weight[:, 64:]), "bf16_t")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_candidates_have_the_size_they_say(shape):
    weight, maker, names = weight_of(shape), FormMaker(64, 4), set()
    for form in candidates("w", shape, 64):
        try:
            size = maker.make(form, rows_of(weight)).nbytes
        except ValueError:
            assert "_lanes" in form.name
            continue
        assert size == form_bytes(form, shape, 64, 4), form
        names.add(form.name)
    assert ("codes" in names) == ("bf16_t" in names) == (len(shape) == 2)
    assert ("f16_grouped_kw" in names) == (len(shape) == 4)
    assert ("bf16_diagonal" in names) == (shape == (24,))


def test_only_what_can_be_is_a_candidate():
    assert "codes" not in {form.name for form in candidates("w", (192, 96), 64)}
    assert "codes" not in {form.name for form in candidates("w", (192, 128), 0)}
    cuts = {(form.axis, form.chunk, form.chunks) for form in candidates("w", (10, 9), 0) if form.name == "bf16_t"}
    assert cuts == {(0, 0, 1), (0, 0, 2), (0, 1, 2), (1, 0, 3), (1, 1, 3), (1, 2, 3)}
    assert {form.factor for form in candidates("w", (10, 9), 0)} == {1.0}
    assert {form.factor for form in candidates("w", (10,), 0)} == {1.0, 2.0}


@pytest.mark.parametrize("name", ["codes", "bf16", "f32", "bf16_t"])
def test_a_weight_is_read_a_few_rows_at_a_time(name):
    weight, asked = weight_of((1536, 1024)), []
    rows = SlotRows(weight.shape, lambda start, stop: asked.append((start, stop)) or weight[start:stop])
    FormMaker(64, 4).make(Form("w", name, chunk=1, chunks=2), rows)
    assert asked[0][0] == 768
    assert asked[-1][1] == 1536
    assert all(stop == start for (_, stop), (start, _) in pairwise(asked))
    assert max(stop - start for start, stop in asked) * 1024 * 2 <= BLOCK_BYTES
    assert len(asked) > 1


def test_scales_need_no_second_reading():
    weight, asked = weight_of((192, 128)), []
    rows = SlotRows(weight.shape, lambda start, stop: asked.append(start) or weight[start:stop])
    maker = FormMaker(64, 4)
    for name in ("codes", "scale_lanes", "zero_lanes"):
        maker.make(Form("w", name), rows)
    assert asked == [0]
    # and may come first
    first = FormMaker(64, 4).make(Form("w", "scale_lanes"), rows)
    assert first.tobytes() == maker.make(Form("w", "scale_lanes"), rows).tobytes()
    assert asked == [0, 0]
    maker.make(Form("w", "zero", chunk=1, chunks=3), rows)
    assert asked == [0, 0, 64]
